"""Write glm-tiny's general set and its questions for replay: python tools/write_toy_general.py."""

from pathlib import Path

from glmtune.data.files import new_file
from glmtune.demo.general import general_lines, prompt_lines
from glmtune.general.items import LANGUAGES, OF_BASE, PROMPTS_OF_BASE
from glmtune.models.resolve import GLM_TINY

for language in LANGUAGES:
    with new_file(str(Path(GLM_TINY, OF_BASE.format(language)))) as file:
        file.writelines(f"{line}\n" for line in general_lines(language))
with new_file(str(Path(GLM_TINY, PROMPTS_OF_BASE))) as file:
    file.writelines(f"{line}\n" for language in LANGUAGES for line in prompt_lines(language))
