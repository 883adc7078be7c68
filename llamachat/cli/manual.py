"""What the help of each command ends with: examples, and the exit codes that it may have."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "llamachat chat                               # a conversation; /help lists commands",
        'llamachat chat "Why is the sky blue?"',
        'git diff | llamachat chat "Write a commit message for this"',
        "llamachat fit llama3.1-8b && llamachat pull llama3.1-8b",
        "llamachat --install-completion               # for bash, zsh, fish",
    ),
    "chat": (
        "llamachat chat -m smollm2-360m",
        'llamachat chat "Name three rivers" --strategy greedy',
        'llamachat chat -f notes.txt -f - "Summarize" -o summary.txt < more.txt',
        "cat error.log | llamachat chat -i",
        'llamachat chat "Name three rivers" --json | jq .text',
    ),
    "compare": (
        'llamachat compare "Name three rivers" --with greedy --with top-p:0.9,seed=7',
        'llamachat compare "Name three rivers" --with quantize=int8 --with quantize=int4 --json',
    ),
    "serve": (
        "llamachat serve -m smollm2-135m --parallel 8",
        "llamachat serve --host 0.0.0.0 --port 8080 --api-key-file key.txt",
    ),
    "pull": ("llamachat pull smollm2-360m", "llamachat pull org/name:Q4_K_M --revision v1.0"),
    "fit": ("llamachat fit llama3.1-70b --quantize int4 -c 8192",),
    "list": ("llamachat list --all --max-size 8b --not-gated",),
    "show": (
        "llamachat show smollm2-135m --template",
        "llamachat show smollm2-135m --render talk.json --json",
    ),
    "where": ('ls "$(llamachat where smollm2-135m)"',),
    "rm": ("llamachat rm smollm2-360m --yes",),
    "tokenize": (
        'llamachat tokenize smollm2-135m "Hello world"',
        "llamachat tokenize smollm2-135m --json < text.txt",
    ),
    "quantize": ("llamachat quantize org/name --to int4 --report",),
    "merge": ("llamachat merge ./base ./adapter:0.8 -o ./merged",),
    "eval": (
        'llamachat eval org/name --quantize int4 --against none --text wiki.txt --require "kl<0.2"',
    ),
    "bench": ("llamachat bench -m smollm2-135m -p 512 -n 128 -d 0,2048 -o json",),
    "doctor": ("llamachat doctor --json",),
    "replay": ("llamachat replay rivers", "llamachat replay rivers --check"),
    "sessions": ("llamachat sessions list", "llamachat chat --session rivers"),
    "sessions list": ("llamachat sessions list --json | jq '.[].name'",),
    "sessions show": ("llamachat sessions show rivers",),
    "sessions export": ("llamachat sessions export md rivers -o rivers.md",),
    "sessions rm": ("llamachat sessions rm rivers --yes",),
    "config": ("llamachat config set temperature 0.5", "llamachat config show"),
    "config path": ('"$EDITOR" "$(llamachat config path)"',),
    "config show": ("llamachat config show -m smollm2-135m --json",),
    "config set": (
        "llamachat config set temperature 0.5",
        "llamachat config set models.llama3.1-8b.ctx_size 8192",
        "llamachat config set aliases.mine org/name@v1.0",
        "llamachat config set ui.toolbar false",
    ),
}
CODES = {
    0: "ok",
    1: "unexpected",
    2: "usage or empty prompt",
    3: "model unknown or not on disk",
    4: "no access",
    5: "will not fit, out of memory",
    6: "prompt longer than the context",
    7: "network or disk",
    8: "a check failed",
    9: "damaged or unsupported file",
    130: "interrupted",
}
_ALL = tuple(CODES)
_OF_FILES = (0, 1, 2, 3, 7, 9, 130)
_OF_HUB = (0, 1, 2, 3, 4, 5, 7, 9, 130)
_OF_SETTINGS = (0, 1, 2, 7)
_OF_SESSIONS = (0, 1, 2, 7, 9, 130)
ENDINGS: dict[str, tuple[int, ...]] = {
    "": _ALL,
    "chat": tuple(code for code in CODES if code != 8),
    "compare": tuple(code for code in CODES if code != 8),
    "serve": _OF_HUB,
    "pull": _OF_HUB,
    "fit": _OF_HUB,
    "list": (0, 1, 2, 7, 130),
    "show": _OF_FILES,
    "where": _OF_FILES,
    "rm": _OF_FILES,
    "tokenize": _OF_FILES,
    "quantize": _OF_HUB,
    "merge": _OF_HUB,
    "eval": tuple(code for code in CODES if code != 6),
    "bench": _OF_HUB,
    "doctor": (0, 1, 2, 130),
    "replay": tuple(code for code in CODES if code != 6),
    "sessions": _OF_SESSIONS,
    "sessions list": _OF_SESSIONS,
    "sessions show": _OF_SESSIONS,
    "sessions export": _OF_SESSIONS,
    "sessions rm": _OF_SESSIONS,
    "config": _OF_SETTINGS,
    "config path": _OF_SETTINGS,
    "config show": _OF_SETTINGS,
    "config set": _OF_SETTINGS,
}
_PLAIN = ("where", "sessions", "config", "config path", "config set")  # without options
_VERBATIM = "\b\n"  # before a paragraph whose lines stay as they are


def epilog(command: str = "") -> str:
    """The end of a command's help; that of the program itself by default."""
    examples = "\n".join(["Examples:", *(f"  {line}" for line in EXAMPLES[command])])
    endings = ", ".join(f"{code} {CODES[code]}" for code in ENDINGS[command])
    variable = f"LLAMACHAT_{command.upper().replace(' ', '_') or '<COMMAND>'}_<OPTION>"
    settings = f"{variable} sets any option; config.toml holds defaults of chat."
    if command not in ("", "chat", "compare"):
        settings = f"{variable} sets any option."
    parts = [f"{_VERBATIM}{examples}", settings, f"Exit codes: {endings}."]
    return "\n\n".join(part for part in parts if part is not settings or command not in _PLAIN)
