"""GPUs by name: memory, compute capability and rated speed, for plans without the card."""

import re
from difflib import get_close_matches

# For each card: GiB as torch reports them (measured on H100 and H200; for others the rated size
# less some percent for drivers and error correction), compute capability, and dense TFLOP/s of its
# tensor cores in 16 bits with sums in float32; None where the vendor states none or, as for laptops
# of 2021, only ranges. If a card was sold with several sizes, each has its own name.
#
# Sources of the TFLOP/s are NVIDIA's own: for data-centre and RTX A/Ada/PRO cards the data sheets
# (halved where those count sparsity, and again where they count 8 bits), for GeForce cards the
# white papers of Turing (TU102), Ampere (GA102), Ada (AD102) and Blackwell (GB202); where these do
# not list a card, the "AI TOPS" of its product page, which are 8 times that figure for the 40
# series and 16 times for the 50 series, and before those 2 (30 series) or 4 (20 series) times the
# float32 TFLOP/s.
CARDS: dict[str, tuple[float, tuple[int, int], float | None]] = {
    "H200": (139.8, (9, 0), 989), "H100": (79.1, (9, 0), 989), "H100 PCIe": (79.1, (9, 0), 756),
    "H100 NVL": (93.0, (9, 0), 835), "H800": (79.1, (9, 0), 989), "H20": (95.0, (9, 0), 148),
    "B200": (178.0, (10, 0), 2250), "A100 40GB": (39.4, (8, 0), 312),
    "A100 80GB": (79.1, (8, 0), 312), "A800 40GB": (39.4, (8, 0), 312),
    "A800 80GB": (79.1, (8, 0), 312), "A30": (23.5, (8, 0), 165), "L40S": (44.4, (8, 9), 362),
    "L40": (44.4, (8, 9), 181), "L20": (44.4, (8, 9), 119.5), "L4": (22.0, (8, 9), 121),
    "A40": (44.4, (8, 6), 150), "A10": (22.1, (8, 6), 125), "A10G": (22.1, (8, 6), 70),
    "A2": (14.5, (8, 6), 18), "V100 16GB": (15.8, (7, 0), 125), "V100 32GB": (31.7, (7, 0), 125),
    "T4": (14.6, (7, 5), 65), "P100": (15.9, (6, 0), 21), "P40": (22.4, (6, 1), None),
    "P4": (7.4, (6, 1), None), "RTX 5090": (31.4, (12, 0), 209.5),
    "RTX 5090 D": (31.4, (12, 0), 148), "RTX 5090 Laptop": (23.5, (12, 0), 114),
    "RTX 5080": (15.6, (12, 0), 112.6), "RTX 5080 Laptop": (15.6, (12, 0), 83.4),
    "RTX 5070 Ti": (15.6, (12, 0), 87.9), "RTX 5070 Ti Laptop": (11.7, (12, 0), 62),
    "RTX 5070": (11.7, (12, 0), 61.7), "RTX 5070 Laptop": (7.8, (12, 0), 49.9),
    "RTX 5060 Ti 8GB": (7.8, (12, 0), 47.4), "RTX 5060 Ti 16GB": (15.6, (12, 0), 47.4),
    "RTX 5060": (7.8, (12, 0), 38.4), "RTX 5060 Laptop": (7.8, (12, 0), 35.7),
    "RTX 5050": (7.8, (12, 0), 26.3), "RTX 4090": (23.6, (8, 9), 165),
    "RTX 4090 D": (23.6, (8, 9), 147), "RTX 4090 Laptop": (15.7, (8, 9), 85.7),
    "RTX 4080": (15.7, (8, 9), 97.5), "RTX 4080 Super": (15.7, (8, 9), 104.5),
    "RTX 4080 Laptop": (11.7, (8, 9), 67.7), "RTX 4070": (11.7, (8, 9), 58.3),
    "RTX 4070 Super": (11.7, (8, 9), 71), "RTX 4070 Ti": (11.7, (8, 9), 80.2),
    "RTX 4070 Ti Super": (15.7, (8, 9), 88.2), "RTX 4070 Laptop": (7.8, (8, 9), 40.1),
    "RTX 4060 Ti 8GB": (7.8, (8, 9), 44.1), "RTX 4060 Ti 16GB": (15.7, (8, 9), 44.1),
    "RTX 4060": (7.8, (8, 9), 30.2), "RTX 4060 Laptop": (7.8, (8, 9), 29.1),
    "RTX 4050 Laptop": (5.8, (8, 9), 24.2), "RTX 3090": (23.7, (8, 6), 71),
    "RTX 3090 Ti": (23.7, (8, 6), 80), "RTX 3080 Ti": (11.8, (8, 6), 68.2),
    "RTX 3080 Ti Laptop": (15.7, (8, 6), None), "RTX 3080 10GB": (9.8, (8, 6), 59.5),
    "RTX 3080 12GB": (11.8, (8, 6), 61.3), "RTX 3080 Laptop 8GB": (7.8, (8, 6), None),
    "RTX 3080 Laptop 16GB": (15.7, (8, 6), None), "RTX 3070": (7.8, (8, 6), 40.6),
    "RTX 3070 Ti": (7.8, (8, 6), 43.5), "RTX 3070 Laptop": (7.8, (8, 6), None),
    "RTX 3070 Ti Laptop": (7.8, (8, 6), None), "RTX 3060 Ti": (7.8, (8, 6), 32.4),
    "RTX 3060 8GB": (7.8, (8, 6), 25.5), "RTX 3060 12GB": (11.8, (8, 6), 25.5),
    "RTX 3060 Laptop": (5.8, (8, 6), None), "RTX 3050 6GB": (5.8, (8, 6), 13.5),
    "RTX 3050 8GB": (7.8, (8, 6), 18.2), "RTX 3050 Laptop 4GB": (3.8, (8, 6), None),
    "RTX 3050 Laptop 6GB": (5.8, (8, 6), None), "RTX 3050 Ti Laptop": (3.8, (8, 6), None),
    "RTX 2080 Ti": (10.8, (7, 5), 53.8), "RTX 2080": (7.8, (7, 5), 40.3),
    "RTX 2080 Super": (7.8, (7, 5), 44.6), "RTX 2070": (7.8, (7, 5), 29.9),
    "RTX 2070 Super": (7.8, (7, 5), 36.2), "RTX 2060 6GB": (5.8, (7, 5), 25.8),
    "RTX 2060 12GB": (11.8, (7, 5), 28.7), "RTX 2060 Super": (7.8, (7, 5), 28.7),
    "GTX 1660": (5.8, (7, 5), None), "GTX 1660 Ti": (5.8, (7, 5), None),
    "GTX 1660 Super": (5.8, (7, 5), None), "GTX 1650": (3.8, (7, 5), None),
    "GTX 1080 Ti": (10.9, (6, 1), None), "GTX 1080": (7.9, (6, 1), None),
    "GTX 1070": (7.9, (6, 1), None), "GTX 1070 Ti": (7.9, (6, 1), None),
    "GTX 1060 3GB": (2.9, (6, 1), None), "GTX 1060 6GB": (5.9, (6, 1), None),
    "TITAN RTX": (23.6, (7, 5), 130.5), "RTX A2000 6GB": (5.8, (8, 6), 32),
    "RTX A2000 12GB": (11.7, (8, 6), 32), "RTX A4000": (15.7, (8, 6), 76.7),
    "RTX A4500": (19.7, (8, 6), 94.6), "RTX A5000": (23.7, (8, 6), 111.1),
    "RTX A5500": (23.7, (8, 6), 136.4), "RTX A6000": (47.5, (8, 6), 155),
    "RTX 2000 Ada": (15.6, (8, 9), 48), "RTX 4000 Ada": (19.5, (8, 9), 81.9),
    "RTX 4500 Ada": (23.5, (8, 9), 158.5), "RTX 5000 Ada": (31.5, (8, 9), 261),
    "RTX 6000 Ada": (47.4, (8, 9), 364), "RTX PRO 6000 Blackwell": (95.0, (12, 0), 500),
    "Quadro RTX 5000": (15.7, (7, 5), 89.2), "Quadro RTX 6000": (23.6, (7, 5), 130.5),
    "Quadro RTX 8000": (47.4, (7, 5), 130.5),
}  # fmt: skip
# NVLink between all cards of a node: GB/s in each direction, half of the total bandwidth of data
# sheets. Bridges that join two cards only (RTX 3090, A40, H100 NVL, cards with PCIe) are left out.
# Of an A100 or A800 it is the SXM form, which a node of eight has.
NVLINK = {
    "B200": 900, "H200": 450, "H100": 450, "H20": 450, "H800": 200, "A100 40GB": 300,
    "A100 80GB": 300, "A800 40GB": 200, "A800 80GB": 200, "V100 16GB": 150, "V100 32GB": 150,
}  # fmt: skip
# PCIe with 16 lanes, GB/s in each direction, from which generation of GPUs on.
_PCIE = {(9, 0): 63.0, (8, 0): 31.5, (0, 0): 15.8}
# What vendors and drivers add to a card's own name.
_AROUND = {
    "NVIDIA", "GEFORCE", "TESLA", "RTX", "GTX", "GPU", "PCIE", "SXM", "SXM2", "SXM3", "SXM4",
    "SXM5", "HBM2", "HBM2E", "HBM3", "HBM3E", "GENERATION", "EDITION", "WORKSTATION", "SERVER",
}  # fmt: skip
# What is listed for a name that is near to none.
_COMMON = ("RTX 3090", "RTX 4090", "RTX 5090", "L40S", "A100 80GB", "H100", "H200", "B200")
# Advertised gigabytes are at most this many times the GiB that torch reports.
_RATED = 1.11


def link_of(name: str, capability: tuple[int, int]) -> tuple[str, float]:
    """The kind of link between the cards of a node, and its GB/s in each direction.

    NVLink by a card's name, otherwise PCIe with 16 lanes by its generation. Some cards use eight
    (RTX 4060 Ti), and some are made for an older one than others of their generation (A2).
    """
    if name in NVLINK:
        return "NVLink", NVLINK[name]
    return "PCIe", next(rate for oldest, rate in _PCIE.items() if capability >= oldest)


def near_cards(name: str, most: int = 5) -> list[str]:
    """Names in `CARDS` that come nearest to a name that means none of them."""
    by_key = {card.upper().removeprefix("RTX ").removeprefix("GTX "): card for card in CARDS}
    found = get_close_matches(name.upper(), by_key, n=most, cutoff=0.5)
    return [by_key[key] for key in found] or list(_COMMON)


def find_cards(name: str) -> list[str]:
    """Names in `CARDS` that a name means: one, several where it leaves that open, or none."""
    words, size = card_words(name)
    cards = {card: card_words(card)[0] for card in CARDS}
    found = [card for card, of_card in cards.items() if of_card == words]
    found = found or [card for card, of_card in cards.items() if words and words < of_card]
    if size:
        found = [card for card in found if CARDS[card][0] <= size <= _RATED * CARDS[card][0]]
    return found


def card_words(name: str) -> tuple[set[str], int | None]:
    """The words that identify a card, and the gigabytes stated in its name."""
    text = re.sub(r"[^A-Z0-9]+", " ", name.upper()).replace("MOBILE", "LAPTOP")
    size = re.search(r"(?<!\S)(\d{1,3}) ?(?:GI?B?)?(?!\S)", text)
    if size:
        text = text[: size.start()] + text[size.end() :]
    text = re.sub(r"\bH100 +PCIE\b", "H100PCIE", text)  # slower than the others of its name
    text = re.sub(r"\b(RTX|GTX)(?=A?\d)", r"\1 ", text)  # RTX4090, RTXA6000
    text = re.sub(r"(?<=\d{4})(?=[A-Z])|(?<=TI)(?=SUPER)", " ", text)  # 4060TI, 4070TISUPER
    return set(text.split()) - _AROUND, int(size[1]) if size else None
