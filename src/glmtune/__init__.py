"""glmtune: fine-tune the GLM family with LoRA, in Chinese and English, on one affordable GPU."""

__version__ = "0.1.0"
