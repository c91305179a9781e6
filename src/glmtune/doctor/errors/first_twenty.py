"""The twenty messages that users of ChatGLM have met most, each quoted from a thread it names."""

from glmtune.doctor.errors.table import DOWNLOAD, KnownError

FIRST_TWENTY = (
    KnownError(
        "AttributeError: 'ChatGLMTokenizer' object has no attribute 'sp_tokenizer'",
        r"ChatGLMTokenizer'? object has no attribute '(sp_tokenizer|tokenizer)'",
        "The model's remote tokenizer code does not work with transformers 4.34 and newer. glmtune "
        "has a tokenizer of its own and never runs that code: load the folder with glmtune.",
        "模型自带的远程分词器代码与 transformers 4.34 及以后的版本不兼容。glmtune 自带分词器，"
        "从不运行那段代码：请用 glmtune 加载该文件夹。",
        "glmtune chat --base chatglm-6b",
        "zai-org/ChatGLM-6B#1505, shibing624/MedicalGPT#295",
    ),
    KnownError(
        "TypeError: ChatGLMTokenizer._pad() got an unexpected keyword argument 'padding_side'",
        r"_pad\(\) got an unexpected keyword argument 'padding_side'",
        "The model's remote tokenizer code does not work with transformers 4.45 and newer. glmtune "
        "has a tokenizer of its own and never runs that code.",
        "模型自带的远程分词器代码与 transformers 4.45 及以后的版本不兼容。glmtune 自带分词器，"
        "从不运行那段代码。",
        "glmtune tokenize --jsonl_path data.jsonl --save_path data --base chatglm-6b",
        "zai-org/ChatGLM3#1324, zai-org/GLM-4#578, modelscope/ms-swift#2151",
    ),
    KnownError(
        "AttributeError: 'ChatGLMForConditionalGeneration' object has no attribute "
        "'_extract_past_from_model_output'",
        r"has no attribute '_extract_past_from_model_output'",
        "The model's remote code calls a function that transformers 4.49 removed. glmtune has "
        "the model natively and decodes by itself.",
        "模型的远程代码调用了 transformers 4.49 已删除的函数。glmtune 内置了原生模型和自己的解"
        "码器。",
        "glmtune infer --data_path data.json --base chatglm-6b --output_path answers.jsonl",
        "zai-org/GLM-4#715, hiyouga/LlamaFactory#9335",
    ),
    KnownError(
        "AttributeError: 'ChatGLMConfig' object has no attribute 'max_length'",
        r"ChatGLMConfig'? object has no attribute '\w+'",
        "The model's remote code reads a field of its config that transformers 5 removed. "
        "glmtune has a config class of its own.",
        "模型的远程代码读取了 transformers 5 已从配置中移除的字段。glmtune 使用自己的配置类。",
        "glmtune chat --base chatglm-6b",
        "zai-org/GLM-4-Voice#181",
    ),
    KnownError(
        "ValueError: 150004 is not in list",
        r"\b1[35]000[0-5] is not in list",
        "Weights, code and vocabulary are of different revisions: the one of March 2023 (150528 "
        "ids) numbers everything 20000 higher than today's (130528). Or a cut row lost its special "
        "ids. Download all files of one revision, and tokenise the rows anew.",
        "权重、代码与词表来自不同版本：2023 年 3 月版（150528 个编号）的所有编号都比现版"
        "（130528）高 20000；或者截断时丢掉了特殊词元。请下载同一版本的全部文件，并重新分词。",
        f"{DOWNLOAD} && glmtune doctor --base chatglm-6b",
        "mymusise/ChatGLM-Tuning#183, zai-org/ChatGLM-6B#329, lich99/ChatGLM-finetune-LoRA#28",
    ),
    KnownError(
        "ValueError: Can't find 'adapter_config.json' at 'output/checkpoint-1000'",
        r"Can't find '?adapter_config\.json",
        "The scripts of 2023 wrote the bare weights into checkpoint-N, and the config only at the "
        "very end. glmtune reads such folders; converting one makes it complete.",
        "2023 年的脚本在 checkpoint-N 里只写了权重，配置要到训练结束才写。glmtune 能读取这样的"
        "文件夹；转换之后就是完整的适配器。",
        "glmtune adapters convert output/checkpoint-1000 adapter",
        "mymusise/ChatGLM-Tuning#198, mymusise/ChatGLM-Tuning#219, huggingface/peft#420",
    ),
    KnownError(
        "ValueError: Target modules ['q_proj', 'v_proj'] not found in the base model. Please check "
        "the target modules and try again.",
        r"Target modules .* not found in the base model",
        "ChatGLM has one fused projection, query_key_value, where other models have q_proj, k_proj "
        "and v_proj.",
        "ChatGLM 只有一个合并的投影 query_key_value，没有其他模型的 q_proj、k_proj、v_proj。",
        "glmtune train --dataset_path data --output_dir output --lora_target query_key_value",
        "hiyouga/LlamaFactory#1785, hiyouga/LlamaFactory#590, hiyouga/LlamaFactory#1412",
    ),
    KnownError(
        "AttributeError: can't set attribute 'eos_token'",
        r"can't set attribute '?(eos|pad|unk)_token|property '(eos|pad|unk)_token' of '\w*Tokeniz",
        "A tool saved the remote tokenizer anew, with fields that its own code cannot read back. "
        "Put the published tokenizer files back into the folder.",
        "某个工具重新保存了远程分词器，写入了其代码自己也读不回来的字段。请把官方的分词器文件放"
        "回文件夹。",
        "hf download zai-org/chatglm-6b ice_text.model tokenizer_config.json --local-dir merged",
        "hiyouga/LlamaFactory#1902, hiyouga/LlamaFactory#5259",
    ),
    KnownError(
        "pyarrow.lib.ArrowInvalid: JSON parse error: Column() changed from object to array in "
        "row 0",
        r"Column\(.*?\) changed from \w+ to \w+ in row \d+|DatasetGenerationError",
        "A row of the data is not what the others are: a field that is no text, a list where an "
        "object should be, a Git-LFS pointer, broken JSON. The validator names file, line and "
        "field.",
        "数据中某一行与其他行结构不同：字段不是文本、该是对象的地方是列表、Git-LFS 指针文件或 "
        "JSON 损坏。校验命令会指出文件、行号和字段。",
        "glmtune validate data.json --json_path report.json",
        "hiyouga/LlamaFactory#4376, hiyouga/LlamaFactory#412, tloen/alpaca-lora#239",
    ),
    KnownError(
        "RuntimeError: Expected all tensors to be on the same device, but found at least two "
        "devices, cuda:0 and cuda:1!",
        r"found at least two devices, cuda:\d+ and (cuda:\d+|cpu)",
        "device_map=auto spreads one model over all cards, while each process of torchrun wants "
        "one card to itself. glmtune gives each process its own card.",
        "device_map=auto 会把一个模型分到所有显卡上，而 torchrun 的每个进程只应占用一张卡。"
        "glmtune 让每个进程各用一张卡。",
        "torchrun --nproc_per_node 2 -m glmtune train --dataset_path data --output_dir output",
        "mymusise/ChatGLM-Tuning#114, mymusise/ChatGLM-Tuning#22, datawhalechina/self-llm#217",
    ),
    KnownError(
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        r"CUDA out of memory|OutOfMemoryError",
        "The step is too large for the card, often only when the first long row comes. Take fewer "
        "tokens a step and recompute activations; nvidia-smi shows who else holds memory.",
        "一步所需的显存超过了显卡，常常在第一条长样本出现时才发生。请减少每步的词元数并重算激活"
        "值；用 nvidia-smi 查看还有谁占用显存。",
        "glmtune train --dataset_path data --output_dir output --tokens_per_step 2048 "
        "--gradient_checkpointing true",
        "beyondguo/LLM-Tuning#25, zai-org/ChatGLM3#806, shuxueslpi/chatGLM-6B-QLoRA#14",
    ),
    KnownError(
        "RuntimeError: Library cudart is not initialized",
        r"Library (cudart|cublasLt|cuda|nvrtc) is not initialized|No module named '?(cpm_kernels|"
        r"icetk)|requires the following packages.*(cpm_kernels|icetk)",
        "cpm_kernels and icetk are helpers of the remote code of 2023; cpm_kernels finds no CUDA "
        "toolkit. glmtune needs neither, for the int8 and int4 folders either.",
        "cpm_kernels 和 icetk 是 2023 年远程代码的依赖；cpm_kernels 找不到 CUDA 工具包。"
        "glmtune 两者都不需要，int8、int4 文件夹也一样。",
        "glmtune chat --base chatglm-6b-int4",
        "zai-org/ChatGLM-6B#115, zai-org/ChatGLM-6B#46, zai-org/ChatGLM-6B#634",
    ),
    KnownError(
        "FileNotFoundError: [Errno 2] No such file or directory: "
        "'output/checkpoint-500/trainer_state.json'",
        r"No such file or directory: '.*trainer_state\.json'",
        "The newest checkpoint was cut off while it was written, and is loaded without a check. "
        "glmtune writes a checkpoint whole or not at all, and resumes from the newest whole one.",
        "最新的检查点没有写完就中断了，却未经检查就被使用。glmtune 的检查点要么完整、要么不存在，"
        "并从最新的完整检查点继续。",
        "glmtune train output/recipe.yaml --resume_from_checkpoint true",
        "zai-org/ChatGLM3#1153, zai-org/ChatGLM3#858, huggingface/transformers#35782",
    ),
    KnownError(
        "RuntimeError: Internal: src/sentencepiece_processor.cc(1101) "
        "[model_proto->ParseFromArray(serialized.data(), serialized.size())]",
        r"model_proto->ParseFromArray|could not parse ModelProto|invalid load key, 'v'|"
        r"HeaderTooLarge",
        "A file is a Git-LFS pointer of some hundred bytes, or was cut short: the repository was "
        "cloned without git-lfs. Fetch the files themselves.",
        "某个文件只是一百多字节的 Git-LFS 指针，或下载不完整：克隆仓库时没有安装 git-lfs。请取"
        "回真正的文件。",
        "cd chatglm-6b && git lfs install && git lfs pull",
        "zai-org/ChatGLM-6B#565, zai-org/ChatGLM2-6B#21, zai-org/ChatGLM3#574",
    ),
    KnownError(
        "RuntimeError: Error(s) in loading state_dict for ChatGLMForConditionalGeneration: size "
        "mismatch for transformer.word_embeddings.weight: copying a param with shape "
        "torch.Size([150528, 4096]) from checkpoint, the shape in current model is "
        "torch.Size([130528, 4096]).",
        r"size mismatch for .*word_embeddings|size mismatch for .*lm_head",
        "config.json is of one revision of ChatGLM-6B and the weights are of the other. Take "
        "config, vocabulary and all shards from one download.",
        "config.json 与权重来自 ChatGLM-6B 的不同版本。配置、词表和所有分片必须来自同一次下载。",
        f"{DOWNLOAD} && glmtune doctor --base chatglm-6b",
        "zai-org/ChatGLM-6B#537",
    ),
    KnownError(
        "RuntimeError: \"addmm_impl_cpu_\" not implemented for 'Half'",
        r"\"\w+\" not implemented for 'Half'",
        "Half precision was asked for on a CPU. There, compute in float32: leave fp16 out. If the "
        "machine has a card, torch does not see it; the doctor says why.",
        "在 CPU 上使用了半精度。CPU 上请用 float32：不要加 fp16。如果机器有显卡，则是 torch 没"
        "有识别到，doctor 会说明原因。",
        "glmtune doctor",
        "zai-org/ChatGLM2-6B#211, zai-org/ChatGLM2-6B#168, zai-org/ChatGLM3#177",
    ),
    KnownError(
        "RuntimeError: probability tensor contains either `inf`, `nan` or element < 0",
        r"probability tensor contains either `?inf|'?grad_norm'?: '?nan|'?loss'?: '?(nan|0\.0'?,)",
        "Values overflowed, mostly in float16: a loss of 0.0 or NaN is a lost run, though most "
        "tools continue. Compute in bfloat16 or float32, and lower the learning rate.",
        "数值溢出，多半发生在 float16：损失为 0.0 或 NaN 说明训练已经失败，尽管多数工具仍会继续。"
        "请改用 bfloat16 或 float32，并降低学习率。",
        "glmtune train --dataset_path data --output_dir output --bf16 true --learning_rate 5e-5",
        "shibing624/MedicalGPT#121, hiyouga/LlamaFactory#4031, zai-org/ChatGLM2-6B#519",
    ),
    KnownError(
        "TypeError: LoraConfig.__init__() got an unexpected keyword argument 'enable_lora'",
        r"unexpected keyword argument '(enable_lora|merge_weights)'",
        "The adapter is of 2023 (PEFT 0.2), whose block-wise form PEFT no longer knows. It can be "
        "written in today's form, with the same effect.",
        "这是 2023 年（PEFT 0.2）的适配器，其分块形式已不被现在的 PEFT 支持。可以转换成现在的格"
        "式，效果相同。",
        "glmtune adapters convert adapter_2023 adapter_today",
        "hiyouga/LlamaFactory#5348, teelinsan/camoscio#3",
    ),
    KnownError(
        "OSError: We couldn't connect to 'https://huggingface.co' to load this file",
        r"couldn't connect to 'https://huggingface\.co|host='huggingface\.co'|"
        r"LocalEntryNotFoundError",
        "The hub cannot be reached from here. Download through a mirror, or elsewhere and copy the "
        "folder; glmtune holds what comes from a hub against the published hashes.",
        "这里无法访问 Hugging Face。请通过镜像下载，或在别处下载后拷贝文件夹；glmtune 会用公布"
        "的哈希值核对从 hub 下载的文件。",
        f"HF_ENDPOINT=https://hf-mirror.com {DOWNLOAD}",
        "WangRongsheng/XrayGLM#70, zai-org/ChatGLM-6B#1471, zai-org/ChatGLM2-6B#554",
    ),
    KnownError(
        "ValueError: Loading chatglm-6b requires you to execute the configuration file in that "
        "repo on your local machine. Make sure you have read the code there to avoid malicious "
        "use, then set the option `trust_remote_code=True` to remove this error.",
        r"requires you to execute the .*file in that repo|contains custom code which must be "
        r"executed",
        "transformers itself has no ChatGLM-6B, so it asks to run Python files of the download. "
        "glmtune has the model natively: nothing of the folder is run.",
        "transformers 本身没有 ChatGLM-6B，因此要求运行下载文件夹中的 Python 文件。glmtune 内置"
        "了原生模型，不会运行文件夹中的任何代码。",
        'python -c "import glmtune.models, transformers as t; '
        "print(t.AutoTokenizer.from_pretrained('chatglm-6b'))\"",
        "langchain-ai/langchain#2710, lm-sys/FastChat#2713, hiyouga/LlamaFactory#4027",
    ),
)
