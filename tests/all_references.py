"""References of all families, by registry name."""

from __future__ import annotations

import importlib

REFERENCES: dict = {}
for module in ("references", "references_qwen", "references_glm", "references_kimi_internvl", "references_kimi_k25"):
    if importlib.util.find_spec(module):
        REFERENCES.update(importlib.import_module(module).REFERENCES)
