"""Messages from reading, tokenising and batching rows, and from answering them."""

from glmtune.doctor.errors.table import TOKENIZE, TRAIN, KnownError

ROWS = (
    KnownError(
        "KeyError: 'seq_len'",
        r"KeyError:? ?\(?['\"]seq_len['\"]",
        "Trainer dropped the column seq_len, as it drops all that forward does not name, or the "
        "rows are of another tokenising. glmtune reads the rows itself and says what it misses.",
        "Trainer 删掉了 forward 参数之外的列 seq_len，或者这些行是用别的方式分词的。glmtune 自己"
        "读取数据，并说明缺什么。",
        TRAIN,
        "mymusise/ChatGLM-Tuning#66, mymusise/ChatGLM-Tuning#49, mymusise/ChatGLM-Tuning#258",
    ),
    KnownError(
        "KeyError: 'context'",
        r"KeyError:? ?\(?['\"](context|target|instruction|output|prompt|response|content|"
        r"summary|conversations|messages)['\"]",
        "The rows have other fields than the script reads: alpaca records have instruction, input "
        "and output, the tokeniser's lines context and target. Check the file, then convert it.",
        "数据的字段与脚本要读的不同：alpaca 记录的字段是 instruction、input、output，分词要读的行"
        "是 context 和 target。请先校验，再转换。",
        "glmtune validate data.json && glmtune convert --data_path data.json --save_path "
        "data.jsonl",
        "hiyouga/LlamaFactory#1388",
    ),
    KnownError(
        "UnicodeDecodeError: 'gbk' codec can't decode byte 0x80 in position 67: illegal multibyte "
        "sequence",
        r"'(gbk|gb2312|gb18030|cp936|cp1252|charmap|ascii)' codec can't (decode|encode)",
        "Python on Windows reads and writes text in the system's code page, while the file is "
        "UTF-8. glmtune reads and writes UTF-8 everywhere; for other scripts, set PYTHONUTF8=1.",
        "Windows 上的 Python 用系统代码页读写文本，而文件是 UTF-8。glmtune 在任何系统上都用 "
        "UTF-8 读写；其他脚本请设置 PYTHONUTF8=1。",
        "glmtune convert --data_path data.json --save_path data.jsonl",
        "aizpy/chatglm-finetune#3, xxw1995/chatglm3-finetune#11, hscspring/hcgf#12",
    ),
    KnownError(
        "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xc4 in position 2: invalid "
        "continuation byte",
        r"'utf-?8' codec can't decode byte",
        "The file is not UTF-8: mostly GBK or UTF-16 from an editor or a spreadsheet. The "
        "validator says what it looks like and where; save it as UTF-8.",
        "文件不是 UTF-8，多半是编辑器或表格软件保存的 GBK 或 UTF-16。校验命令会指出像是什么编码、"
        "在哪一行；请另存为 UTF-8。",
        "glmtune validate data.json",
    ),
    KnownError(
        "json.decoder.JSONDecodeError: Extra data: line 2 column 1 (char 143)",
        r"Extra data: line \d+ column \d+",
        "The file holds an object a line (JSON lines), and was read as one JSON text. glmtune "
        "reads both, by what is in them.",
        "文件是每行一个对象的 JSON 行，却被当作一个 JSON 读取。glmtune 按内容识别，两种都能读。",
        "glmtune validate data.jsonl",
    ),
    KnownError(
        "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
        r"Expecting (value|property name enclosed in double quotes|',' delimiter|':' delimiter): "
        r"line \d+|Unterminated string starting at|Invalid control character at: line|"
        r"Invalid \\?escape: line",
        "The JSON is broken or empty: a missing comma or bracket, single quotes, or a file that "
        "is a web page. The validator names every such place.",
        "JSON 损坏或为空：缺逗号或括号、用了单引号，或文件其实是网页。校验命令会指出每一处。",
        "glmtune validate data.json",
    ),
    KnownError(
        "ValueError: Unable to create tensor, you should probably activate truncation and/or "
        "padding with 'padding=True' 'truncation=True' to have batched tensors with the same "
        "length.",
        r"Unable to create tensor, you should probably activate|"
        r"expected sequence of length \d+ at dim 1 \(got \d+\)",
        "Rows of different lengths were put into one tensor. glmtune pads or packs rows itself.",
        "把长度不同的行直接拼成了一个张量。glmtune 会自己填充或打包。",
        TRAIN,
        "zai-org/GLM-4#118",
    ),
    KnownError(
        "RuntimeError: CUDA error: device-side assert triggered",
        r"device-side assert triggered|srcIndex < srcSelectDimSize|index out of range in self",
        "An id is beyond the rows of the embedding: the rows were tokenised for the other revision "
        "of ChatGLM-6B, or for another model. Tokenise them with the base that is trained.",
        "有编号超出了词嵌入的行数：数据是用 ChatGLM-6B 的另一版本或别的模型分词的。请用要训练的底"
        "座重新分词。",
        f"{TOKENIZE} --base chatglm-6b",
        "27182812/ChatGLM-LLaMA-chinese-insturct#28",
    ),
    KnownError(
        "AttributeError: 'NoneType' object has no attribute 'max_source_length'",
        r"has no attribute 'max_(source|target)_length'",
        "A script of P-Tuning was started without its data settings. glmtune has one length, for "
        "the question and for the answer each.",
        "P-Tuning 脚本启动时没有给出数据参数。glmtune 只有一个长度设置，分别用于问题和回答。",
        f"{TOKENIZE} --max_seq_length 200",
    ),
    KnownError(
        "Input length of input_ids is 2084, but `max_length` is set to 2048. This can lead to "
        "unexpected behavior. You should consider increasing `max_new_tokens`.",
        r"Input length of input_ids is \d+, but [`'\"]?max_length",
        "max_length counts the question, too, and a long chat has used it up. max_new_tokens "
        "counts the answer alone; ChatGLM-6B has 2,048 positions for both.",
        "max_length 把问题也算在内，长对话把它用完了。max_new_tokens 只算回答；ChatGLM-6B 问答合"
        "计有 2048 个位置。",
        "glmtune infer --data_path data.json --adapter output --max_new_tokens 150",
        "zai-org/ChatGLM-6B#17, zai-org/ChatGLM-6B#83, zai-org/ChatGLM2-6B#65",
    ),
    KnownError(
        "ValueError: `temperature` has to be a strictly positive float, but is 0",
        r"temperature[`'\"]?[^\n]{0,20} (has to|must) be a strictly positive float",
        "A temperature of 0 divides by zero; an integer may be refused as well. What is meant is "
        "the likeliest token each time, which is no draw.",
        "温度为 0 会导致除以零；整数也可能被拒绝。想要的是每次都取最可能的词元，也就是不抽样。",
        "glmtune infer --data_path data.json --adapter output --do_sample false",
        "lxe/simple-llm-finetuner#14, Vision-CAIR/MiniGPT-4#200",
    ),
)
