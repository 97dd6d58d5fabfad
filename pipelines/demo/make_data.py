"""Write the demo's data: orders in plain words, and the strict JSON that a shop's software wants.

    python pipelines/demo/make_data.py pipelines/demo

The same files for the same seed, byte for byte. The base model knows notes, and JSON under keys that a question names; this
wording and this schema, which no question spells out, are new to it.
"""

import json
import random
import sys
from pathlib import Path

SEED = 20261121
TRAIN_ROWS, EVAL_ROWS = 2000, 300
SYSTEM = "Turn the order into JSON."
NAMES = [
    "Adele",
    "Amara",
    "Anders",
    "Bianca",
    "Bruno",
    "Camila",
    "Cyrus",
    "Dalia",
    "Dmitri",
    "Edith",
    "Elif",
    "Farid",
    "Freya",
    "Gustav",
    "Hanna",
    "Haruki",
    "Imani",
    "Ingrid",
    "Jamal",
    "Joana",
    "Karim",
    "Keiko",
    "Lars",
    "Leila",
    "Lorenzo",
    "Malik",
    "Marta",
    "Mateo",
    "Naomi",
    "Nikolai",
    "Nuria",
    "Oksana",
    "Pablo",
    "Petra",
    "Rafael",
    "Rania",
    "Rohan",
    "Saskia",
    "Selma",
    "Soren",
    "Thea",
    "Tomas",
    "Valentina",
    "Viktor",
    "Wanda",
    "Yasmin",
    "Yuki",
    "Zahra",
    "Zlatan",
]
ITEMS = [
    "pizza",
    "burger",
    "salad",
    "soup",
    "taco",
    "burrito",
    "sandwich",
    "bagel",
    "muffin",
    "cake",
    "pie",
    "cookie",
    "curry",
    "noodle",
    "bowl",
    "wrap",
    "pretzel",
    "pancake",
    "waffle",
    "smoothie",
    "coffee",
    "tea",
    "lamp",
    "chair",
    "shelf",
    "rug",
    "blanket",
    "pillow",
    "mug",
    "kettle",
    "basket",
    "candle",
    "mirror",
    "scarf",
    "hat",
    "coat",
    "backpack",
    "notebook",
    "puzzle",
    "kite",
    "bell",
]
KINDS = [
    "mushroom",
    "tomato",
    "spinach",
    "pepper",
    "cheese",
    "chicken",
    "bean",
    "pumpkin",
    "vanilla",
    "chocolate",
    "cherry",
    "ginger",
    "lemon",
    "almond",
    "coconut",
    "red",
    "blue",
    "green",
    "black",
    "white",
    "wooden",
    "cotton",
    "glass",
    "copper",
    "travel",
    "garden",
]
SIZES = ("small", "medium", "large")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
STREETS = [
    "Acorn",
    "Canal",
    "Dover",
    "Eagle",
    "Forest",
    "Grove",
    "Harbour",
    "Island",
    "Juniper",
    "Laurel",
    "Meadow",
    "Orchard",
    "Poplar",
    "Summit",
    "Tower",
    "Valley",
]
WAYS = ("Street", "Road", "Lane", "Avenue")
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
KEYS = ("customer", "item", "quantity", "size", "address", "day")


def order(rng: random.Random) -> tuple[str, str]:
    """(words of a customer, the JSON that is wanted); what is not said is null."""
    customer, quantity = rng.choice(NAMES), rng.randint(1, 9)
    item = f"{rng.choice(KINDS)} {rng.choice(ITEMS)}"
    size = rng.choice(SIZES) if rng.random() < 0.7 else None
    address = f"{rng.randint(1, 199)} {rng.choice(STREETS)} {rng.choice(WAYS)}" if rng.random() < 0.75 else None
    day = rng.choice(DAYS) if rng.random() < 0.7 else None
    values = (customer, item, quantity, size, address, day and day.lower())
    answer = json.dumps(dict(zip(KEYS, values, strict=True)), separators=(",", ":"))
    return _words(rng, customer, _amount(rng, quantity, size, item), address, day), answer


def _amount(rng: random.Random, quantity: int, size: str | None, item: str) -> str:
    number = str(quantity) if rng.random() < 0.5 else NUMBERS[quantity]
    if quantity == 1 and rng.random() < 0.5:
        number = "a"
    return " ".join(part for part in (number, size, item if quantity == 1 else _plural(item)) if part)


def _words(rng: random.Random, customer: str, amount: str, address: str | None, day: str | None) -> str:
    to = "" if address is None else rng.choice((f" to {address}", f", delivered to {address},", f" at {address}"))
    on = "" if day is None else rng.choice((f" on {day}", f" by {day}", f" for {day}"))
    rest = to + on if rng.random() < 0.5 else on + to
    rest = rest.removesuffix(",")
    return rng.choice(
        (
            f"Hi, this is {customer}. Could you send {amount}{rest}?",
            f"Good morning! {customer} here, I'd like to order {amount}{rest}.",
            f"I want {amount}{rest}. My name is {customer}.",
            f"Order for {customer}: {amount}{rest}.",
            f"Please put {amount} aside{rest}, it's for {customer}.",
            f"{customer} needs {amount}{rest}, thanks.",
            f"Can we get {amount}{rest}? Cheers, {customer}",
            f"Hello, {amount}{rest} please. Best, {customer}",
            f"For {customer}, {amount}{rest}. Thank you!",
        )
    )


def _plural(item: str) -> str:
    if item.endswith(("s", "x", "ch", "sh")):
        return item + "es"
    if item.endswith("y") and item[-2] not in "aeiou":
        return item[:-1] + "ies"
    return item[:-2] + "ves" if item.endswith("lf") else item + "s"


def rows(count: int, rng: random.Random, taken: set[str]) -> list[dict[str, list[dict[str, str]]]]:
    """`count` rows whose words are not in `taken`, which grows."""
    made = []
    while len(made) < count:
        said, wanted = order(rng)
        if said not in taken:
            taken.add(said)
            turns = (("system", SYSTEM), ("user", said), ("assistant", wanted))
            made.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return made


def main() -> None:
    directory = Path(sys.argv[1])
    rng, taken = random.Random(SEED), set[str]()
    for name, count in (("train", TRAIN_ROWS), ("eval", EVAL_ROWS)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(count, rng, taken))
        (directory / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
