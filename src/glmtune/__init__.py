"""glmtune: fine-tune the GLM family with LoRA, in Chinese and English, on one affordable GPU."""

__version__ = "0.1.0"

registers_models = True
"""Whether `import glmtune.models` registers the native models with transformers' Auto classes at
once. The command line names each class itself and puts off importing them, which takes seconds."""
