"""Messages from drivers, libraries, network, memory and disk."""

from glmtune.doctor.errors.table import DOWNLOAD, TRAIN, KnownError

_UPDATE = "python -m pip install -U transformers peft accelerate datasets huggingface_hub"

MACHINE = (
    KnownError(
        "AssertionError: Torch not compiled with CUDA enabled",
        r"Torch not compiled with CUDA enabled",
        "This torch is the build for CPUs. Install the build for your CUDA from pytorch.org into "
        "the same environment; the doctor says what torch sees then.",
        "安装的 torch 是 CPU 版。请在同一环境里从 pytorch.org 安装与 CUDA 对应的版本；之后 "
        "doctor 会说明 torch 识别到什么。",
        "glmtune doctor",
        "zai-org/ChatGLM-6B#920, zai-org/ChatGLM-6B#1089, zai-org/ChatGLM2-6B#6",
    ),
    KnownError(
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040).",
        r"NVIDIA driver on your system is too old|CUDA driver version is insufficient|"
        r"Found no NVIDIA driver on your system",
        "The driver is older than the CUDA that torch was built for, or there is none. Update the "
        "driver, or take the torch build for an older CUDA.",
        "显卡驱动比 torch 所用的 CUDA 旧，或没有安装驱动。请升级驱动，或安装对应旧版 CUDA 的 "
        "torch。",
        "nvidia-smi && glmtune doctor",
    ),
    KnownError(
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
        r"no kernel image is available for execution|is not compatible with the current PyTorch",
        "This torch has no code for the card: the card is newer or much older than the build. "
        "Install another build of torch.",
        "当前 torch 不包含该显卡的代码：显卡太新或太旧。请换一个 torch 版本。",
        "glmtune doctor",
    ),
    KnownError(
        "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling "
        "`cublasCreate(handle)`",
        r"CUBLAS_STATUS_\w+",
        "The card's memory is full, or an id beyond the embedding broke an earlier kernel. "
        "Computed in order, the first message is the true one.",
        "显存已满，或者前面某个核函数因编号超出词嵌入而出错。按顺序执行时，第一条报错才是真正的原"
        "因。",
        f"CUDA_LAUNCH_BLOCKING=1 {TRAIN} --tokens_per_step 2048",
    ),
    KnownError(
        "UserWarning: The installed version of bitsandbytes was compiled without GPU support.",
        r"bitsandbytes was compiled without GPU support|libbitsandbytes_cpu\.(so|dll)|"
        r"CUDA Setup failed despite GPU being available|cadam32bit_grad_fp32",
        "bitsandbytes found no CUDA library that fits torch's, mostly since it is old or torch "
        "is the build for CPUs.",
        "bitsandbytes 没有找到与 torch 匹配的 CUDA 库，多半是版本太旧，或 torch 是 CPU 版。",
        "python -m pip install -U bitsandbytes && glmtune doctor",
        "bitsandbytes-foundation/bitsandbytes#719, bitsandbytes-foundation/bitsandbytes#26",
    ),
    KnownError(
        "importlib.metadata.PackageNotFoundError: No package metadata was found for bitsandbytes",
        r"No package metadata was found for bitsandbytes|No module named '?bitsandbytes|"
        r"requires the latest version of bitsandbytes",
        "Quantising to 8 or 4 bits while loading needs bitsandbytes, which is not installed here.",
        "加载时量化成 8 或 4 位需要 bitsandbytes，而这里没有安装。",
        "python -m pip install -U bitsandbytes",
    ),
    KnownError(
        "TypeError: Descriptors cannot not be created directly.",
        r"Descriptors cannot (not )?be created directly|cannot import name 'builder' from "
        r"'google\.protobuf|requires the protobuf library",
        "icetk and old sentencepiece were generated for an old protobuf. glmtune reads the "
        "vocabulary without icetk and without protobuf.",
        "icetk 和旧版 sentencepiece 的代码是为旧版 protobuf 生成的。glmtune 读取词表不需要 icetk"
        "，也不需要 protobuf。",
        "glmtune tokenize --jsonl_path data.jsonl --save_path data --base chatglm-6b",
    ),
    KnownError(
        "ImportError: cannot import name 'EncoderDecoderCache' from 'transformers'",
        r"cannot import name '?\w+'? from '?(partially initialized module ')?"
        r"(transformers|peft|accelerate|huggingface_hub|datasets|tokenizers)\b",
        "The libraries are of versions that do not belong together. Update them together.",
        "几个库的版本互不匹配。请一起升级。",
        f"{_UPDATE} && glmtune doctor",
    ),
    KnownError(
        "AttributeError: module 'torch' has no attribute 'compiler'",
        r"module 'torch(\.\w+)*' has no attribute '\w+'",
        "torch is older than what another library asks of it. Update torch in this environment.",
        "torch 比其他库要求的版本旧。请在当前环境升级 torch。",
        "python -m pip install -U torch && glmtune doctor",
    ),
    KnownError(
        "ModuleNotFoundError: No module named 'peft'",
        r"No module named '?(glmtune|yaml|pydantic|peft|datasets|accelerate|transformers|torch)\b",
        "This Python is not the one that glmtune was installed into: the environment is not "
        "active.",
        "当前的 Python 不是安装 glmtune 的那个：虚拟环境没有激活。",
        "source .venv/bin/activate && glmtune doctor",
    ),
    KnownError(
        "ssl.SSLCertVerificationError: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: "
        "unable to get local issuer certificate",
        r"CERTIFICATE_VERIFY_FAILED|certificate verify failed",
        "A proxy in between answers with a certificate of its own, which Python does not know. "
        "Name its authority's file, or fetch through a mirror.",
        "中间的代理用了自己的证书，Python 不信任它。请指定该机构的证书文件，或通过镜像下载。",
        f"SSL_CERT_FILE=company-ca.pem {DOWNLOAD}",
    ),
    KnownError(
        "requests.exceptions.ProxyError: Unable to connect to proxy",
        r"ProxyError|Unable to connect to proxy|check_hostname requires server_hostname",
        "The proxy that the environment names does not answer, or speaks no TLS. Take it out of "
        "the environment, or correct it.",
        "环境变量中的代理没有响应，或不支持 TLS。请取消或改正代理设置。",
        f"env -u HTTP_PROXY -u HTTPS_PROXY -u http_proxy -u https_proxy {DOWNLOAD}",
    ),
    KnownError(
        "OSError: [Errno 28] No space left on device",
        r"No space left on device|Disk quota exceeded|not enough free disk space",
        "The disk is full, or your share of it: ChatGLM-6B takes 13 GB, a cache of it as much "
        "again. Move the hub's cache; the doctor prints what is free.",
        "磁盘或你的配额已满：ChatGLM-6B 需要 13 GB，缓存还要同样多。请把 hub 缓存移到别处；"
        "doctor 会列出剩余空间。",
        "HF_HOME=big-disk/huggingface glmtune doctor",
    ),
    KnownError(
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: exitcode : -9 (pid: "
        "4012)",
        r"exitcode\s*: ?-9\b|Signal 9 \(SIGKILL\)|died with <Signals\.SIGKILL",
        "The system killed the process: the computer's own memory, not the card's, ran out, mostly "
        "while weights were loaded in float32.",
        "系统杀掉了进程：用完的是电脑内存而不是显存，多半发生在以 float32 加载权重时。",
        "glmtune plan --base chatglm-6b --quantization_bit 8",
    ),
    KnownError(
        "RuntimeError: MPS backend out of memory (MPS allocated: 17.65 GB)",
        r"MPS backend out of memory|PYTORCH_MPS_HIGH_WATERMARK_RATIO|"
        r"(operator|type)[^\n]{0,80}(is )?not (currently )?(implemented|supported)[^\n]{0,30} MPS",
        "Apple's GPU shares the computer's memory, and lacks some operations. On the CPU the run "
        "is slower, and works.",
        "苹果 GPU 与系统共用内存，且缺少部分运算。改在 CPU 上运行会慢一些，但可以完成。",
        f"{TRAIN} --use_cpu true",
    ),
)
