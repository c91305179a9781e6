"""Messages from loading a base, a tokenizer or an adapter."""

from glmtune.doctor.errors.table import CHAT, DOWNLOAD, TOKENIZE, KnownError

LOADING = (
    KnownError(
        "ModuleNotFoundError: No module named 'transformers_modules.chatglm-6b'",
        r"No module named '?transformers_modules",
        "transformers copies the model's Python files into a package named after the folder; a "
        "dot, a slash or a relative path in that name breaks the import. glmtune runs none of "
        "those files, so any folder name will do.",
        "transformers 会把模型的 Python 文件复制成以文件夹命名的包；名字里有点号、斜杠或使用相对"
        "路径都会导致导入失败。glmtune 不运行这些文件，文件夹可以任意命名。",
        CHAT,
        "zai-org/ChatGLM-6B#1038, zai-org/ChatGLM-6B#331, huggingface/transformers#27430",
    ),
    KnownError(
        "OSError: Error no file named pytorch_model.bin, tf_model.h5, model.ckpt.index or "
        "flax_model.msgpack found in directory chatglm-6b.",
        r"no file named \[?'?[^\n]{0,120}pytorch_model\.bin",
        "The folder lacks weights, or the index that says which shard holds what; or it is the "
        "folder of an adapter. Fetch the whole folder again; an adapter is named by --adapter.",
        "文件夹里缺少权重，或缺少说明各分片内容的索引文件；也可能它是适配器的文件夹。请重新下载完"
        "整的文件夹；适配器要用 --adapter 指定。",
        f"{DOWNLOAD} && glmtune doctor --base chatglm-6b",
        "zai-org/ChatGLM-6B#1009, zai-org/ChatGLM-6B#801, mymusise/ChatGLM-Tuning#162",
    ),
    KnownError(
        "RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central "
        "directory",
        r"PytorchStreamReader failed|unexpected EOF, expected \d+ more bytes|"
        r"MetadataIncompleteBuffer|InvalidHeaderDeserialization|header or archive is corrupt",
        "A weight file was cut short while it was fetched or copied. Fetch it anew; the doctor "
        "names a file that is not whole.",
        "某个权重文件在下载或拷贝时没有传完。请重新下载；doctor 会指出不完整的文件。",
        f"{DOWNLOAD} --force-download && glmtune doctor --base chatglm-6b",
    ),
    KnownError(
        "_pickle.UnpicklingError: Weights only load failed. This file can still be loaded, to do "
        "so you have two options",
        r"Weights only load failed|vulnerability issue in [`'\"]?torch\.load|"
        r"upgrade torch to at least v2\.6",
        "A .bin file is a pickle, which may run code, so torch refuses it. glmtune reads the "
        "tensors of such files without running anything of them.",
        ".bin 文件是 pickle 格式，可能执行代码，因此 torch 拒绝加载。glmtune 只读取其中的张量，不"
        "执行任何内容。",
        CHAT,
    ),
    KnownError(
        'OSError: Not found: "chatglm-6b/ice_text.model": No such file or directory Error #2',
        r"Not found: \"[^\"]*ice_text\.model\"|No such file or directory: '[^']*ice_text\.model'",
        "The vocabulary, ice_text.model, is not in the folder; the config alone makes no "
        "tokenizer.",
        "文件夹里没有词表文件 ice_text.model，仅有配置无法构造分词器。",
        "hf download zai-org/chatglm-6b ice_text.model --local-dir chatglm-6b",
    ),
    KnownError(
        "ValueError: Tokenizer class ChatGLMTokenizer does not exist or is not currently imported.",
        r"Tokenizer class ChatGLM\w*Tokenizer\w* does not exist",
        "The tokenizer's class is in remote code that was not loaded. glmtune has one of its own.",
        "分词器类在远程代码里，而远程代码没有加载。glmtune 自带分词器。",
        f"{TOKENIZE} --base chatglm-6b",
    ),
    KnownError(
        "ValueError: Unrecognized configuration class <class "
        "'transformers_modules.chatglm-6b.configuration_chatglm.ChatGLMConfig'> for this kind of "
        "AutoModel: AutoModelForCausalLM.",
        r"Unrecognized configuration class .{0,200}ChatGLMConfig|"
        r"model type [`'\"]?chatglm[`'\"]? but Transformers does not recognize|KeyError: 'chatglm'",
        "transformers has no ChatGLM, and none was registered with its Auto classes. glmtune's "
        "verbs know it; in Python, import glmtune.models before loading.",
        "transformers 不认识 ChatGLM，Auto 类也没有注册过它。glmtune 的命令可以直接使用；在 "
        "Python 中，请先 import glmtune.models 再加载。",
        CHAT,
    ),
    KnownError(
        "AttributeError: 'ChatGLMForConditionalGeneration' object has no attribute 'stream_chat'",
        r"ChatGLM\w*'? object has no attribute '(chat|stream_chat|quantize)'",
        "chat, stream_chat and quantize are functions of the remote code. glmtune has verbs for "
        "them.",
        "chat、stream_chat 和 quantize 是远程代码里的函数。glmtune 有对应的命令。",
        f"{CHAT} --quantization_bit 8",
    ),
    KnownError(
        "AttributeError: 'ChatGLMModel' object has no attribute 'prefix_encoder'",
        r"prefix_encoder|PrefixEncoder",
        "This is P-Tuning v2: its checkpoints hold a prefix and nothing of the model, and load "
        "only with the base and the same pre_seq_len. glmtune reads both off the file; infer, "
        "compare and chat take its folder as --adapter, and distil makes LoRA of it.",
        "这是 P-Tuning v2：它的检查点只有前缀，没有模型，必须与底座和相同的 pre_seq_len 一起加载。"
        "glmtune 从文件里读出这些大小：infer、compare 和 chat 可以把它的目录当作 --adapter，"
        "distil 可以把它变成 LoRA。",
        "glmtune adapters distil checkpoint-3000 --data_path prompts.json --output_dir lora",
        "zai-org/ChatGLM-6B#358, zai-org/ChatGLM-6B#1045, zai-org/ChatGLM2-6B#76",
    ),
    KnownError(
        "size mismatch for base_model.model.transformer.layers.0.attention.query_key_value.lora_B."
        "default.weight: copying a param with shape torch.Size([8192, 8, 1]) from checkpoint, the "
        "shape in current model is torch.Size([12288, 8]).",
        r"size mismatch for \S*lora_[AB]\S* copying a param with shape "
        r"torch\.Size\(\[\d+, \d+, 1\]\)",
        "The adapter is of 2023 (PEFT 0.2): it tunes query and value by a grouped convolution, "
        "which today's PEFT does not know. Written in today's form it has the same effect.",
        "这是 2023 年（PEFT 0.2）的适配器：它用分组卷积微调 query 和 value，现在的 PEFT 不认识这"
        "种形式。转换成现在的格式后效果相同。",
        "glmtune adapters convert adapter_2023 adapter_today",
        "huggingface/peft#372",
    ),
    KnownError(
        "size mismatch for base_model.model.transformer.layers.0.attention.query_key_value.lora_A."
        "default.weight: copying a param with shape torch.Size([256, 4096]) from checkpoint, the "
        "shape in current model is torch.Size([512, 4096]).",
        r"\A(?![\s\S]*torch\.Size\(\[\d+, \d+, 1\]\) from)[\s\S]*size mismatch for \S*lora_[AB]\S* "
        r"copying a param with shape torch\.Size\(\[\d+(, \d+)?\]\) from",
        "The adapter's weights have another rank, or belong to another base, than its "
        "adapter_config.json says; a size of 0 was saved by DeepSpeed ZeRO-3 without its weights. "
        "The check names what does not fit.",
        "适配器权重的秩或所属底座与 adapter_config.json 不一致；大小为 0 则是 DeepSpeed ZeRO-3 保"
        "存时没有写入权重。check 会指出哪里不符。",
        "glmtune check output --base chatglm-6b",
        "zai-org/ChatGLM3#657, hiyouga/ChatGLM-Efficient-Tuning#262",
    ),
    KnownError(
        "UserWarning: Found missing adapter keys while loading the checkpoint",
        r"Found missing adapter keys while loading",
        "The adapter's names are not those of the base, so part of it, or all, has no effect, "
        "though loading continues. glmtune refuses such an adapter and reads every naming of 2023.",
        "适配器中的名称与底座对不上，因此部分或全部不起作用，但加载仍会继续。glmtune 会拒绝这样的"
        "适配器，并能读取 2023 年以来的各种命名。",
        "glmtune check output --base chatglm-6b",
    ),
    KnownError(
        "TypeError: LoraConfig.__init__() got an unexpected keyword argument 'corda_config'",
        r"LoraConfig\.__init__\(\) got an unexpected keyword argument "
        r"'(?!enable_lora|merge_weights)\w+'",
        "adapter_config.json was written by a newer PEFT than the one that reads it. Update PEFT "
        "where it is read.",
        "adapter_config.json 由更新版本的 PEFT 写出，读取它的 PEFT 太旧。请在读取的一方升级 PEFT。",
        "python -m pip install -U peft",
    ),
    KnownError(
        "AttributeError: 'NoneType' object has no attribute 'int4WeightExtractionHalf'",
        r"int[48]WeightExtraction(Half|Float)|name 'CPUKernel' is not defined",
        "The int4 and int8 folders' remote code found no kernels: cpm_kernels is missing, or could "
        "not be compiled. glmtune reads these folders without them.",
        "int4、int8 文件夹的远程代码找不到内核：cpm_kernels 没有安装，或编译失败。glmtune 读取这"
        "些文件夹时不需要它们。",
        "glmtune chat --base chatglm-6b-int4",
        "zai-org/ChatGLM-6B#1483, zai-org/ChatGLM-6B#185, zai-org/ChatGLM2-6B#145",
    ),
    KnownError(
        "Compile parallel cpu kernel gcc -O3 -fPIC -pthread -fopenmp -std=c99 "
        "quantization_kernels_parallel.c -shared -o quantization_kernels_parallel.so failed.",
        r"Compile (parallel )?cpu kernel[^\n]* failed|quantization_kernels\w*\.so failed|"
        r"'(gcc|nvcc)' is not recognized|CUDA_HOME environment variable is not set|"
        r"nvcc: (command )?not found",
        "Remote code or an extension wanted a compiler (gcc, nvcc). The int4 and int8 folders need "
        "none with glmtune, on a CPU either.",
        "远程代码或某个扩展需要编译器（gcc、nvcc）。用 glmtune 读取 int4、int8 文件夹不需要编译，"
        "在 CPU 上也一样。",
        "glmtune chat --base chatglm-6b-int4",
        "zai-org/ChatGLM-6B#214",
    ),
    KnownError(
        "NotImplementedError: Cannot copy out of meta tensor; no data!",
        r"Cannot copy out of meta tensor|is on the meta device, we need a|"
        r"weights? offloaded to the disk",
        "device_map=auto left part of the model without memory of its own, on disk or nowhere. Let "
        "the base take less, so that all of it is on the card.",
        "device_map=auto 使模型的一部分没有真正载入（放在磁盘上或根本没有）。请让底座占用更少显存"
        "，使其全部放进显卡。",
        f"{CHAT} --quantization_bit 4",
    ),
    KnownError(
        "huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. Repository Not Found "
        "for url: https://huggingface.co/api/models/chatglm-6b.",
        r"RepositoryNotFoundError|Repository Not Found for url|is not a valid model identifier|"
        r"HFValidationError|Repo id must",
        "There is no such folder here, so its name was taken for a hub id, and the hub has none of "
        "that name either. Correct the path, or name the hub's: zai-org/chatglm-6b.",
        "这里没有这个文件夹，于是它的名字被当成了 hub 上的编号，而 hub 上也没有。请改正路径，或写"
        " hub 上的名称：zai-org/chatglm-6b。",
        "glmtune doctor --base zai-org/chatglm-6b",
    ),
)
