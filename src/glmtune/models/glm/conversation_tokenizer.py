"""Conversations as the younger family's tokenizers offer them to transformers' clients.

Only the chat template makes special ids: names that a message spells stay text.
"""

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from glmtune.errors import UserError
from glmtune.models.glm.chat_templates import own_template
from glmtune.models.glm.conversations import ConversationEncoder
from glmtune.models.special_names import GUARD, check_mask_can_be, guard_chat, mark


class ConversationTokenizer(ConversationEncoder):
    """What both classes add to an encoder: settings, and conversations by the chat template."""

    unfinished = "(?!)"
    """The end of a decoded text that more ids may turn into something else: only the beginning of
    a character, which is known without this."""
    keeps_marks = False
    """Whether a rendered chat keeps the marks of its special names, which `encode` reads."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoTokenizer") -> None:
        """Do nothing: what is registered so leaves a copy of its source in each saved folder."""

    def _complete(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a tokenizer_config.json says, and what it leaves out."""
        layout = self.layout
        kwargs.pop("auto_map", None)  # it names code that a published folder has and we do not run
        kwargs["variant"] = layout.name
        kwargs["eos_token"] = kwargs.get("eos_token") or layout.stops[0]
        kwargs["pad_token"] = kwargs.get("pad_token") or layout.pad
        kwargs["chat_template"] = kwargs.get("chat_template") or own_template(
            layout, has_blank=self.has_blank
        )
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        return kwargs

    def apply_chat_template(
        self,
        conversation: Any,
        tools: list | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        *,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        return_tensors: str | None = None,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        **variables: Any,
    ) -> Any:
        """Messages as the chat template writes them; arguments as transformers' method.

        Ids are those of rows: a role's newline is encoded as there, and special names in a message
        stay text, whether `sanitize_control_tokens` says so or not. `assistant_masks` is 1 where a
        ``{% generation %}`` block wrote.

        Raises:
            jinja2.TemplateError: what the template refuses.
            UserError: a mask is wanted of a conversation that cannot have one.
        """
        if return_assistant_tokens_mask:
            check_mask_can_be(tokenize, return_dict, continue_final_message)
        conversation, given = guard_chat(conversation, tools, documents, variables, self.beginnings)
        given["add_generation_prompt"] = add_generation_prompt
        given["continue_final_message"] = continue_final_message
        parent: Any = super()
        rendered = parent.apply_chat_template(
            conversation, chat_template=chat_template, tokenize=False, **given
        )
        is_batch = isinstance(rendered, list)
        rendered = rendered if is_batch else [rendered]
        if not tokenize:
            texts = [
                mark(text, self.written_names) if self.keeps_marks else text.replace(GUARD, "")
                for text in rendered
            ]
            return texts if is_batch else texts[0]
        rows = {"input_ids": [self.written_ids(mark(t, self.written_names)) for t in rendered]}
        if return_assistant_tokens_mask:
            render: Any = render_jinja_template  # its annotation covers the text only
            rendered, spans = render(
                conversations=conversation if is_batch else [conversation],
                chat_template=parent.get_chat_template(chat_template, tools),
                return_assistant_tokens_mask=True,
                **(parent.special_tokens_map | given),
            )
            rows["assistant_masks"] = [
                self._assistant_mask(text, of_text)
                for text, of_text in zip(rendered, spans, strict=True)
            ]
        if truncation and max_length is not None:
            cuts_start = getattr(self, "truncation_side", "right") == "left"
            kept = slice(-max_length, None) if cuts_start else slice(max_length)
            rows = {key: [row[kept] for row in values] for key, values in rows.items()}
        masks = rows.pop("assistant_masks", None)
        batch = parent.pad(
            rows, padding=padding, max_length=max_length, return_attention_mask=True,
            **(tokenizer_kwargs or {}),
        )  # fmt: skip
        if masks is not None:
            batch["assistant_masks"] = [
                self._fit(row, ids) for row, ids in zip(masks, batch["input_ids"], strict=True)
            ]
        if not is_batch and return_tensors is None:
            for key in batch:
                batch[key] = batch[key][0]
        if return_tensors:
            batch = batch.convert_to_tensors(tensor_type=return_tensors)
        return batch if return_dict else batch["input_ids"]

    def _assistant_mask(self, rendered: str, spans: list[tuple[int, int]]) -> list[int]:
        """For each id of a rendered chat, 1 where a ``{% generation %}`` block wrote it.

        Raises:
            UserError: a block begins or ends within a piece of text.
        """

        def ids_until(end: int | None) -> list[int]:
            return self.written_ids(mark(rendered[:end], self.written_names))

        ids = ids_until(None)
        flags = [0] * len(ids)
        for start, end in spans:
            before, until = ids_until(start), ids_until(end)
            if ids[: len(before)] != before or ids[: len(until)] != until:
                raise UserError(
                    "return_assistant_tokens_mask: a generation block of this chat template begins "
                    "or ends within a piece; let it begin and end at a special token"
                )
            flags[len(before) : len(until)] = [1] * (len(until) - len(before))
        return flags

    def _fit(self, flags: list[int], row: list[int]) -> list[int]:
        """A mask padded as its row was."""
        padding = [0] * (len(row) - len(flags))
        return padding + flags if getattr(self, "padding_side", "") == "left" else flags + padding
