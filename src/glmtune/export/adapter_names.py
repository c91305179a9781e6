"""An adapter in the names that another program reads it in."""

from glmtune.adapters.formats import Adapter
from glmtune.adapters.naming import in_published_names
from glmtune.data.files import read_json_object
from glmtune.export.job import Job
from glmtune.models.hubs import CONFIG_FILE

USE_HF = "use --to hf, which merges it into the base"
"""What to do with an adapter that a target cannot hold."""


def has_published_base(job: Job) -> bool:
    """Whether the base's folder is in the publisher's layout, whose engines use its names."""
    settings = read_json_object(job.base_folder / CONFIG_FILE)
    return job.family.exports.is_published(settings)


def in_names_of_base(job: Job) -> Adapter:
    """The adapter in the names that a program has which loads the base's folder as it is."""
    if has_published_base(job):
        return in_published_names(job.adapter, job.family, job.config)
    return job.adapter
