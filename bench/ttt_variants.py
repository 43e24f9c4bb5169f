"""What bench/ttt_tuning.py tries: settings by the names of its rows. Plain data, which bench/forecast.py reads, too."""

from __future__ import annotations

OFF = "without learning"
VARIANTS: dict[str, dict[str, str]] = {
    "rate of the adapters / 2": dict(TTT_LORA_LR="5e-4"),
    "rate of the adapters x 2": dict(TTT_LORA_LR="2e-3"),
    "beta2 0.9": dict(TTT_BETA2="0.9"),
    "beta2 0.999": dict(TTT_BETA2="0.999"),
    "rank / 2": dict(TTT_LORA_RANK="8", TTT_LORA_ALPHA="9"),
    "rank x 2": dict(TTT_LORA_RANK="32", TTT_LORA_ALPHA="36"),
    "chunk / 2": dict(TTT_CHUNK_SIZE="24"),
    "chunk x 2": dict(TTT_CHUNK_SIZE="96"),
    "no prefix": dict(PHASED_TTT_PREFIX_DOCS="0"),
    "prefix / 2": dict(PHASED_TTT_PREFIX_DOCS="100"),
    "rate of all weights / 2": dict(GLOBAL_TTT_LR="0.005"),
    "rate of all weights x 2": dict(GLOBAL_TTT_LR="0.02"),
    "steps of all weights / 2 as long": dict(GLOBAL_TTT_CHUNK_TOKENS="2048"),
    # What gained alone, further and together: smaller chunks, more steps, may be no more than a higher rate.
    "rate of the adapters x 4": dict(TTT_LORA_LR="4e-3"),
    "rate of the adapters x 8": dict(TTT_LORA_LR="8e-3"),
    "rate x 4, chunk / 2": dict(TTT_LORA_LR="4e-3", TTT_CHUNK_SIZE="24"),
    "rate x 4, chunk / 4": dict(TTT_LORA_LR="4e-3", TTT_CHUNK_SIZE="12"),
    "rate x 2, chunk / 4": dict(TTT_LORA_LR="2e-3", TTT_CHUNK_SIZE="12"),
    "rate x 4, rank x 2": dict(TTT_LORA_LR="4e-3", TTT_LORA_RANK="32", TTT_LORA_ALPHA="36"),
    "rate x 2, rank x 2, chunk / 2": dict(
        TTT_LORA_LR="2e-3", TTT_LORA_RANK="32", TTT_LORA_ALPHA="36", TTT_CHUNK_SIZE="24"
    ),
    # What the budget of a GPU's evaluation could pay for, each at the rates that were good for longer chunks.
    "chunk x 2/3": dict(TTT_CHUNK_SIZE="32"),
    "rate x 2, chunk x 2/3": dict(TTT_LORA_LR="2e-3", TTT_CHUNK_SIZE="32"),
    "rate x 4, chunk x 2/3": dict(TTT_LORA_LR="4e-3", TTT_CHUNK_SIZE="32"),
    "rate x 2, chunk / 2": dict(TTT_LORA_LR="2e-3", TTT_CHUNK_SIZE="24"),
    # With a cache of keys and values, a chunk costs as much as its window, and not as its context.
    "rate x 2, chunk / 3": dict(TTT_LORA_LR="2e-3", TTT_CHUNK_SIZE="16"),
    "rate x 2, chunk x 2/3, cache": dict(TTT_LORA_LR="2e-3", TTT_CHUNK_SIZE="32", TTT_RECOMPUTE_TOKENS="2"),
    "rate x 2, chunk x 2/3, 32 recomputed": dict(TTT_LORA_LR="2e-3", TTT_CHUNK_SIZE="32", TTT_RECOMPUTE_TOKENS="32"),
    "rate x 2, chunk / 2, 40 recomputed": dict(TTT_LORA_LR="2e-3", TTT_CHUNK_SIZE="24", TTT_RECOMPUTE_TOKENS="40"),
    "rate x 2, chunk / 3, 16 recomputed": dict(TTT_LORA_LR="2e-3", TTT_CHUNK_SIZE="16", TTT_RECOMPUTE_TOKENS="16"),
    "rate x 2, chunk / 3, 48 recomputed": dict(TTT_LORA_LR="2e-3", TTT_CHUNK_SIZE="16", TTT_RECOMPUTE_TOKENS="48"),
    # Small chunks early in a document, long ones late: 8, 24 and 48 targets.
    "rate x 2, growing chunks, 16 recomputed": dict(
        TTT_LORA_LR="2e-3", TTT_SHORT_DOC_CHUNKS="1", TTT_RECOMPUTE_TOKENS="16"
    ),
    "rate x 2, growing chunks": dict(TTT_LORA_LR="2e-3", TTT_SHORT_DOC_CHUNKS="1"),
    "chunk / 3, 48 recomputed": dict(TTT_CHUNK_SIZE="16", TTT_RECOMPUTE_TOKENS="48"),
    "rate x 4, chunk / 3, 48 recomputed": dict(TTT_LORA_LR="4e-3", TTT_CHUNK_SIZE="16", TTT_RECOMPUTE_TOKENS="48"),
    # What is scored is a mixture with the model before test-time training.
    "mixed": dict(TTT_PLAIN_WEIGHT="0.25"),
    "rate x 2, chunk / 3, 48 recomputed, mixed": dict(
        TTT_LORA_LR="2e-3", TTT_CHUNK_SIZE="16", TTT_RECOMPUTE_TOKENS="48", TTT_PLAIN_WEIGHT="0.25"
    ),
    "rate x 4, chunk / 3, 48 recomputed, mixed": dict(
        TTT_LORA_LR="4e-3", TTT_CHUNK_SIZE="16", TTT_RECOMPUTE_TOKENS="48", TTT_PLAIN_WEIGHT="0.25"
    ),
    # LoRA+: a lower rate for A, and a higher one for B.
    "rate / 2, B's x 10, chunk / 3, 48 recomputed": dict(
        TTT_LORA_LR="5e-4", TTT_LORAPLUS_LR_RATIO="10", TTT_CHUNK_SIZE="16", TTT_RECOMPUTE_TOKENS="48"
    ),
    "rate / 2, B's x 10, chunk / 3, 48 recomputed, mixed": dict(
        TTT_LORA_LR="5e-4",
        TTT_LORAPLUS_LR_RATIO="10",
        TTT_CHUNK_SIZE="16",
        TTT_RECOMPUTE_TOKENS="48",
        TTT_PLAIN_WEIGHT="0.25",
    ),
}
