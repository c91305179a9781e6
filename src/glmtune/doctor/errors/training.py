"""Messages from a training script: its arguments, number formats and gradients."""

from glmtune.doctor.errors.table import TRAIN, KnownError

_TORCHRUN = "torchrun --nproc_per_node 2 -m glmtune train --dataset_path data --output_dir output"

TRAINING = (
    KnownError(
        "finetune.py: error: unrecognized arguments: --local-rank=0",
        r"unrecognized arguments:[^\n]*--local[-_]rank|HfArgumentParser: \['--local[-_]rank",
        "torch.distributed.launch passes the rank as a flag, in a spelling that the script does "
        "not know. torchrun passes it in the environment; glmtune accepts both.",
        "torch.distributed.launch 用参数传递进程序号，而脚本不认识这种写法。torchrun 通过环境变量"
        "传递；glmtune 两种都接受。",
        _TORCHRUN,
        "microsoft/LoRA#79, FlagAI-Open/FlagAI#401",
    ),
    KnownError(
        "ValueError: Some specified arguments are not used by the HfArgumentParser: "
        "['--peft_path', 'output']",
        r"not used by the HfArgumentParser: \[(?!'--local)",
        "The script does not know these flags: they are another trainer's, or of another version. "
        "docs/flags.md lists what becomes of 400 such names here.",
        "脚本不认识这些参数：它们属于别的训练工具或别的版本。docs/flags.md 列出了四百多个这样的名"
        "字在这里的对应关系。",
        "glmtune train --help",
    ),
    KnownError(
        "TypeError: TrainingArguments.__init__() got an unexpected keyword argument "
        "'evaluation_strategy'",
        r"(Trainer|TrainingArguments|SFTConfig)\.__init__\(\) got an unexpected keyword argument",
        "The script was written for an older transformers or TRL, which has renamed or dropped "
        "that argument since. glmtune reads the old names, with a word about each.",
        "脚本是为旧版 transformers 或 TRL 写的，该参数后来改名或取消了。glmtune 能读取旧名，并逐"
        "一说明。",
        f"{TRAIN} --eval_ratio 0.05 --eval_steps 500",
    ),
    KnownError(
        "RuntimeError: expected mat1 and mat2 to have the same dtype, but got: c10::Half != float",
        r"m(at)?1 and m(at)?2 (to|must) have the same dtype|self and mat2 must have the same dtype|"
        r"expected scalar type (Half|BFloat16|Float) but found",
        "Base and adapter are in different number formats, mostly after .half() on one of them. "
        "glmtune keeps the adapter in float32 and computes in one format.",
        "底座和适配器的数值格式不同，多半是对其中一个调用了 .half()。glmtune 的适配器用 float32 "
        "保存，计算时使用同一种格式。",
        f"{TRAIN} --bf16 true",
        "hiyouga/LlamaFactory#4432, zai-org/GLM-4#693, liangwq/Chatglm_lora_multi-gpu#18",
    ),
    KnownError(
        "ValueError: Attempting to unscale FP16 gradients.",
        r"Attempting to unscale FP16 gradients",
        "The weights that are trained are in float16, and mixed precision wants them in float32. "
        "glmtune trains the adapter in float32, whatever the base is in.",
        "被训练的权重是 float16，而混合精度要求它们是 float32。无论底座是什么格式，glmtune 的适配"
        "器都用 float32 训练。",
        f"{TRAIN} --fp16 true",
    ),
    KnownError(
        "RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn",
        r"does not require grad and does not have a grad_fn|"
        r"None of the inputs have requires_grad=True",
        "Nothing that is trained was reached: recomputing activations cut the frozen base off, "
        "or no linear got an adapter. glmtune recomputes with gradients kept.",
        "反向传播没有到达任何要训练的权重：重算激活值时冻结的底座断开了梯度，或没有任何线性层加上"
        "适配器。glmtune 重算时会保留梯度。",
        f"{TRAIN} --gradient_checkpointing true",
    ),
    KnownError(
        "AttributeError: 'ChatGLMForConditionalGeneration' object has no attribute "
        "'enable_input_require_grads'",
        r"has no attribute '(enable_input_require_grads|get_input_embeddings)'|"
        r"unexpected keyword argument 'gradient_checkpointing_kwargs'",
        "The script, the remote code and transformers are of different ages. glmtune needs no "
        "remote code and recomputes activations by itself.",
        "脚本、远程代码和 transformers 的版本不配套。glmtune 不需要远程代码，自己重算激活值。",
        f"{TRAIN} --gradient_checkpointing true",
        "zai-org/ChatGLM-6B#999",
    ),
    KnownError(
        "ValueError: You can't train a model that has been loaded with `device_map='auto'` in any "
        "distributed mode.",
        r"can't train a model that has been loaded (with|in)[^\n]{0,60}(device_map|8-bit|4-bit)|"
        r"\.to[`'\"]? is not supported for [`'\"]?(4|8)-bit|"
        r"cannot perform fine-tuning on purely quantized models",
        "A quantised or spread model was to be moved or trained as if it were a plain one. glmtune "
        "quantises onto each process's own card and trains the adapter alone.",
        "把量化的或分散到多卡的模型当作普通模型来移动或训练了。glmtune 在每个进程自己的显卡上量化"
        "，只训练适配器。",
        f"{TRAIN} --quantization_bit 4",
    ),
    KnownError(
        "wandb.errors.UsageError: api_key not configured (no-tty). call "
        "wandb.login(key=[your_api_key])",
        r"wandb\.errors\.\w+|wandb: ERROR",
        "The script reports to Weights & Biases, which wants an account. glmtune writes "
        "metrics.jsonl and TensorBoard's files, and sends nothing anywhere.",
        "脚本要把指标上报到 Weights & Biases，需要账号。glmtune 只写 metrics.jsonl 和 "
        "TensorBoard 文件，不向任何地方上传。",
        f"{TRAIN} --report_to tensorboard",
    ),
    KnownError(
        "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp, unhandled cuda "
        "error, NCCL version 2.21.5",
        r"Watchdog caught collective operation timeout|NCCL error in:|nccl(Internal|UnhandledCuda|"
        r"System|Remote)Error|unhandled (cuda|system) error, NCCL",
        "One process did not reach a collective operation: it failed or waits, or the cards "
        "cannot reach each other. Its own message is higher up; NCCL_DEBUG prints more.",
        "某个进程没有到达共同的步骤：它出错了、在等待，或显卡之间无法通信。它自己的报错在更前面；"
        "NCCL_DEBUG 会给出更多信息。",
        f"NCCL_DEBUG=INFO {_TORCHRUN}",
    ),
    KnownError(
        "RuntimeError: The server socket has failed to listen on any local network address. port: "
        "29500, code: -98, name: EADDRINUSE, message: address already in use",
        r"server socket has failed to (listen|bind)|EADDRINUSE",
        "Another run on this machine holds the port of the launcher. --standalone takes a free "
        "one.",
        "本机上另一个训练占用了启动器的端口。加 --standalone 会自动选用空闲端口。",
        _TORCHRUN.replace("torchrun", "torchrun --standalone"),
    ),
    KnownError(
        "RuntimeError: DataLoader worker (pid 4021) is killed by signal: Bus error. It is possible "
        "that dataloader's workers are out of shared memory.",
        r"DataLoader worker \(pid[^\n]{0,30}\) (is killed|exited)|insufficient shared memory",
        "Workers that load rows ran out of shared memory, as in a container with a small /dev/shm. "
        "glmtune reads rows as arrays in the process itself.",
        "读取数据的子进程用完了共享内存，常见于 /dev/shm 很小的容器。glmtune 在主进程里以数组方式"
        "读取数据。",
        TRAIN,
    ),
)
