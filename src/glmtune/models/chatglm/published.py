"""Known sha256 of the published files of ChatGLM-6B, used if the hub cannot be reached."""

import re

KNOWN_SHARDS = {
    "v1.1": (
        "14dafdc73e1b1da131fec6668f58774bf6eab1215963f92bdd5c7d81dc6ca383",
        "8678043a60cd2ce373543fffe8de9508a8cf4266d2c0f088d52167cae74af839",
        "84744300522f53f778744012cd95ffd6f0e533515e53034035fe7cca5daf70b0",
        "43eb8279007c062e39fd44e536647bc5d0069773c3a69ca087f60aa3b85894d5",
        "ccfc9d265ddc00a00e8d6c4f5328c381d64eb2c68e06b5214f4b73bed149e41d",
        "f13d68803861c8575a9702c4923e1ef1ed601d8ca17ca62841c32860be24e597",
        "570c6a9aad83b2b383765e27f6bddcad40efddeb84f8490aea29dc0e43666ac5",
        "39d30a1d55c7e0138ef8b85190f927851f0fda5483a6465b104f9696ceaec8b4",
    ),
    "v1.0": (
        "fe5bac6bfa5b5404ddfe3fabe04862b785e013afd7b308b7beca08239f9489fa",
        "a80198fb714f7363d7e541125bb70b9cb6b1d1ef5988d32a7a25a852a374cbc3",
        "aaba0ae53b3ea30559575c8528dab52ca291a26ac847c5601fcf874db401198f",
        "968d134dd9b11e393d160144f097d6bff8c559413e3f75e9e0b6d35618eba669",
        "fc628ce0dcd5c38783e63fc81dd1b609fe01670ec3b855b358aa0d1d7ea48bf3",
        "511ec23b7907b7a26461671775a2ac08c08fb3695285bbe7d91fc534d7cbfd7e",
        "245d64e05cebeb214d696bccc87c1dbdf16c67c366e7f54af452ec5748c2186e",
        "e764ebdece24219efeda3c18aa32fe6414da3d1f533df8845815609e9ef7f4a7",
    ),
}
"""Hashes of the publisher's ChatGLM-6B shards in float16, in their order.

Source: git-lfs pointers to these files in public repositories; their sizes are those of the files.
Not known: the first and last shard of v1.0 without image tokens, which was published in between.
"""
KNOWN_VOCABULARIES = {
    "5e974d9a69c242ce014c88c2b26089270f6198f3c0b700a887666cd3e816f17e",  # since mid-2023
    "99871e0c85db81ad7af1028854fd091cd5778c8414ae9d94bbbc10d02c831c21",  # March 2023
}
"""Hashes of the vocabularies of the publisher's ChatGLM-6B, quantised or not."""
_PUBLISHED = re.compile(r"(zai-org|THUDM)/chatglm-6b(-int8|-int4|-int4-qe)?")
_SHARD = re.compile(r"pytorch_model-0000([1-8])-of-00008\.bin")


def known_sha256(hub_id: str, name: str) -> set[str]:
    """The accepted sha256 of a published file; empty if unknown."""
    found = _PUBLISHED.fullmatch(hub_id)
    if found and name == "ice_text.model":
        return KNOWN_VOCABULARIES
    if found and not found[2] and (shard := _SHARD.fullmatch(name)):
        return {shards[int(shard[1]) - 1] for shards in KNOWN_SHARDS.values()}
    return set()
