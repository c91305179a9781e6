"""`glmtune push`: show what would be uploaded, and with `--yes true` upload it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from glmtune.config.share import PushSettings
from glmtune.errors import note, visible
from glmtune.export.card_parts import CARD_FILE
from glmtune.export.hubs import check_modelscope, upload_to_huggingface, upload_to_modelscope
from glmtune.export.parcel import Parcel, Source
from glmtune.export.push_card import card_of

_MOST_LEFT_OUT = 12


def push(settings: PushSettings) -> str | None:
    """List files with their sizes and print the card; upload them if that is asked for.

    Optimiser states, rows and logs are never among them, and a file with an absolute path or a
    token in it is refused.

    Returns:
        The repository's address; None where nothing was uploaded.

    Raises:
        UserError: there is nothing to upload, the name breaks the base's licence, a file holds what
            is not to be shown, or the hub refuses.
    """
    if settings.to == "modelscope":
        check_modelscope()
    source = Source.of(settings.folder, settings.base)
    source.check_name(settings.repo_id)
    if source.adapter is not None:
        note(*source.adapter.notices)
    with TemporaryDirectory(prefix="glmtune-push-") as place:
        card = card_of(source, settings.repo_id)
        parcel = Parcel.pack(source, card, Path(place))
        own = [source.named, *([source.base_folder] if source.base_folder else [])]
        parcel.check([folder.resolve() for folder in own])
        _show(parcel, settings)
        if not settings.yes:
            print(f"nothing was uploaded; --yes true uploads these {len(parcel.files)} files")
            return None
        upload = {"huggingface": upload_to_huggingface, "modelscope": upload_to_modelscope}
        url = upload[settings.to](parcel.files, settings.repo_id, private=settings.private)
    print(f"uploaded: {url}")
    return url


def _show(parcel: Parcel, settings: PushSettings) -> None:
    kind = "private" if settings.private else "public"
    print(f"{settings.repo_id} on {settings.to}, {kind}: {parcel.num_bytes / 1e6:,.2f} MB")
    width = max(map(len, parcel.files))
    for name, path in sorted(parcel.files.items()):
        print(f"  {name:<{width}}  {path.stat().st_size:>14,} bytes")
    if parcel.left_out:
        more = len(parcel.left_out) - _MOST_LEFT_OUT
        names = ", ".join(parcel.left_out[:_MOST_LEFT_OUT])
        print(visible(f"not uploaded: {names}{f' and {more} more' if more > 0 else ''}"))
    print(f"\n{CARD_FILE}:\n\n{visible(parcel.files[CARD_FILE].read_text(encoding='utf-8'))}")
