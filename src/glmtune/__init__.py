"""glmtune: fine-tune the GLM family with LoRA, in Chinese and English, on one affordable GPU."""

__version__ = "0.1.0"

is_command = False
"""Whether this process is the command `glmtune`, not a program that imports the package. Only for
the latter does `import glmtune.models` register the native models with transformers' Auto classes
at once: the command names each class itself, and puts off importing them, which takes seconds."""
