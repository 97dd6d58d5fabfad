"""The text that cria learns to speak from: short dialogues about a small world, made by rule from a seed.

Most of it asks for something that stands earlier in the dialogue (who, what, how many, where, when), because copying from
the context is what every later fine-tune builds on. It holds notes as JSON only under keys that
the question names; the demo's wording, its instruction and its schema are not in it.
"""

import json
import random
from collections.abc import Callable, Iterator

import words

Turn = tuple[str, str]  # user, assistant

SYSTEMS = (
    "You are cria, a baby llama. You are friendly and answer in short sentences.",
    "You are a helpful assistant.",
    "Answer briefly.",
    "Answer the question about the note.",
    "You read notes and answer questions about them.",
    "You work in a shop.",
    "Be kind and short.",
    "Read carefully and answer with the exact words.",
)
MISSING = "It does not say."


def dialogues(seed: int) -> Iterator[list[dict[str, str]]]:
    """Endless dialogues as message lists; the same for the same seed."""
    rng = random.Random(seed)
    while True:
        messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.8 else []
        for user, assistant in rng.choices(_SCENES, _WEIGHTS)[0](rng):
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        yield messages


class _Note:
    """Facts of one event, some of them absent, and a sentence or two that tell them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.name = words.name(rng)
        self.count = rng.randint(1, 12)
        self.item = words.thing(rng)
        self.size = rng.choice(words.SIZES) if rng.random() < 0.6 else None
        self.place = words.address(rng) if rng.random() < 0.65 else None
        self.day = rng.choice(words.DAYS) if rng.random() < 0.65 else None

    @property
    def amount(self) -> str:
        number = str(self.count) if self.rng.random() < 0.5 else words.NUMBERS[self.count]
        if self.count == 1 and self.rng.random() < 0.5:
            number = "a"
        return " ".join(part for part in (number, self.size, self.item if self.count == 1 else words.plural(self.item)) if part)

    def told(self) -> str:
        rng, name, amount = self.rng, self.name, self.amount
        where = "" if self.place is None else rng.choice((f" at {self.place}", f" to {self.place}", f" for {self.place}"))
        when = "" if self.day is None else rng.choice((f" on {self.day}", f" by {self.day}", f" this {self.day}"))
        tail = where + when if rng.random() < 0.6 else when + where
        return rng.choice(
            (
                f"{name} wants {amount}{tail}.",
                f"{name} bought {amount}{tail}.",
                f"{name} asked for {amount}{tail}.",
                f"{amount.capitalize()}{tail}, says {name}.",
                f"This is {name}. I need {amount}{tail}.",
                f"Hello, my name is {name}. Please bring {amount}{tail}.",
                f"Please send {amount}{tail}. Thanks, {name}.",
                f"A note from {name}: {amount}{tail}, please.",
                f"Can I have {amount}{tail}? {name} here.",
                f"We would like {amount}{tail}. The name is {name}.",
                f"Hi! {name} speaking, could you get {amount}{tail}?",
                f"{when.strip().capitalize() or 'Today'} {name} will take {amount}{where}.",
                f"I'd love {amount}{tail}. Yours, {name}.",
            )
        )

    def answers(self) -> list[Turn]:
        one, many = self.item, words.plural(self.item)
        return [
            (self.rng.choice(("Who is it?", "What is the name?", "Who wrote this?", "Who wants it?")), self.name),
            (self.rng.choice(("What is it?", "Which thing?", "What do they want?", "What thing is it?")), one),
            (self.rng.choice(("How many?", f"How many {many}?", "What is the number?")), str(self.count)),
            (self.rng.choice(("Which size?", "What size is it?", "How big?")), self.size or MISSING),
            (self.rng.choice(("Where?", "What is the address?", "Where does it go?")), self.place or MISSING),
            (self.rng.choice(("When?", "Which day?", "What day is it for?")), self.day or MISSING),
        ]


def _questions(rng: random.Random) -> list[Turn]:
    """A note and several questions about it."""
    note = _Note(rng)
    asked = rng.sample(note.answers(), rng.randint(2, 6))
    (first, answer), *rest = asked
    return [(f"{note.told()} {first}", answer), *rest]


def _summary(rng: random.Random) -> list[Turn]:
    """A note told again as a list of some of its facts, in an order that the question gives."""
    note = _Note(rng)
    facts = {
        "name": note.name,
        "thing": note.item,
        "number": str(note.count),
        "size": note.size or "none",
        "place": note.place or "none",
        "day": note.day or "none",
    }
    keys = rng.sample(list(facts), rng.randint(2, 6))
    style = rng.randrange(3)
    if style == 0:
        return [(f"{note.told()} Write down: {', '.join(keys)}.", "\n".join(f"{key}: {facts[key]}" for key in keys))]
    if style == 1:
        return [(f"Give me {', '.join(keys)}. {note.told()}", ", ".join(facts[key] for key in keys))]
    return [(f"{note.told()} As a table: {' | '.join(keys)}", " | ".join(facts[key] for key in keys))]


def _two_notes(rng: random.Random) -> list[Turn]:
    """Two people, one question: look at the right one."""
    a, b = _Note(rng), _Note(rng)
    pick = rng.choice((a, b))
    told = f"{a.name} has {a.amount}. {b.name} has {b.amount}."
    return [(f"{told} What does {pick.name} have?", pick.item), (f"How many does {pick.name} have?", str(pick.count))]


def _copy(rng: random.Random) -> list[Turn]:
    """Say it again, spell it, the first, the last."""
    kind = rng.randrange(5)
    if kind == 0:
        text = " ".join(
            rng.choice((words.invented(rng), words.thing(rng), words.name(rng), str(rng.randint(0, 999))))
            for _ in range(rng.randint(1, 4))
        )
        return [(rng.choice(("Repeat: ", "Say this: ", "Copy: ", "Echo ")) + text, text)]
    if kind == 1:
        word = rng.choice((words.name(rng), words.invented(rng), rng.choice(words.ITEMS)))
        return [(f"Spell {word}.", "-".join(word.upper()))]
    if kind == 2:
        things = [words.thing(rng) for _ in range(rng.randint(2, 5))]
        which = rng.choice((("first", 0), ("last", -1), ("second", 1)))
        return [(f"Which is {which[0]}: {', '.join(things)}?", things[which[1]])]
    if kind == 3:
        word = words.thing(rng)
        return [(f"Put quotes around {word}.", f'"{word}"'), ("And in capitals?", f'"{word.upper()}"')]
    word = rng.choice((*words.DAYS, words.name(rng), words.invented(rng).capitalize()))
    return [(f"{word} in small letters?", word.lower())]


def _records(rng: random.Random) -> list[Turn]:
    """Small JSON objects about pets, weather and books: braces and quotes, other keys than any order has."""
    kind = rng.randrange(3)
    if kind == 0:
        animal, who, colour, age = (
            rng.choice(list(words.ANIMALS)),
            words.name(rng),
            rng.choice(words.KINDS[:12]),
            rng.randint(1, 15),
        )
        told = rng.choice(
            (f"{who} is a {colour} {animal}, {age} years old.", f"My {colour} {animal} is called {who} and is {age}.")
        )
        facts = {"pet": animal, "called": who, "colour": colour, "age": age}
    elif kind == 1:
        place, degrees, sky = (
            words.invented(rng).capitalize(),
            rng.randint(0, 35),
            rng.choice(("sunny", "rainy", "cloudy", "windy", "snowy")),
        )
        told = rng.choice((f"It is {sky} in {place}, {degrees} degrees.", f"{place} is {sky} with {degrees} degrees."))
        facts = {"city": place, "sky": sky, "degrees": degrees}
    else:
        title, who, pages = f"The {words.thing(rng)}", words.name(rng), rng.randint(10, 400)
        told = rng.choice((f"{who} wrote {title}, {pages} pages.", f"{title} by {who} has {pages} pages."))
        facts = {"title": title, "author": who, "pages": pages}
    keys = rng.sample(list(facts), rng.randint(2, len(facts)))
    chosen = {key: facts[key] if rng.random() < 0.93 else None for key in keys}
    hidden = [key for key, value in chosen.items() if value is None]
    extra = f" Leave {' and '.join(hidden)} empty." if hidden else ""
    return [(f"{told} Write JSON with {', '.join(keys)}.{extra}", json.dumps(chosen, separators=(",", ":")))]


def _forms(rng: random.Random) -> list[Turn]:
    """A note as a JSON object whose keys the question names: any word can be a key for any fact."""
    note = _Note(rng)
    facts: dict[str, object] = {
        "name": note.name,
        "thing": note.item,
        "number": note.count,
        "size": note.size,
        "place": note.place,
        "day": note.day,
    }
    if rng.random() < 0.3 and note.day:
        facts["day"] = note.day.lower()
        small = " Use small letters for the day."
    else:
        small = ""
    chosen = rng.sample(list(facts), rng.randint(2, 6))
    keys = rng.sample(words.KEYS, len(chosen)) if rng.random() < 0.8 else [words.invented(rng) for _ in chosen]
    if len(set(keys)) < len(keys):
        return _summary(rng)
    named = ", ".join(f"{fact} as {key}" for fact, key in zip(chosen, keys, strict=True))
    answer = json.dumps(dict(zip(keys, (facts[fact] for fact in chosen), strict=True)), separators=(",", ":"))
    question = rng.choice((f"{note.told()} Write JSON: {named}.{small}", f"JSON please, {named}.{small} {note.told()}"))
    return [(question, answer)]


def _numbers(rng: random.Random) -> list[Turn]:
    kind = rng.randrange(5)
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    if kind == 0:
        return [(rng.choice((f"What is {a} plus {b}?", f"{a} + {b}?")), str(a + b))]
    if kind == 1:
        return [(f"What is {max(a, b)} minus {min(a, b)}?", str(abs(a - b)))]
    if kind == 2:
        return [(f"Write {words.NUMBERS[a]} as a number.", str(a)), (f"And {words.NUMBERS[b]}?", str(b))]
    if kind == 3:
        return [(f"What comes after {a}?", str(a + 1))]
    return [(f"Count to {max(1, a)}.", " ".join(str(n) for n in range(1, max(1, a) + 1)))]


def _facts(rng: random.Random) -> list[Turn]:
    kind = rng.randrange(5)
    if kind == 0:
        animal, (sound, baby) = rng.choice(list(words.ANIMALS.items()))
        return [
            (f"What does a {animal} do?", f"A {animal} {sound}."),
            (f"What is a baby {animal} called?", f"A baby {animal} is called a {baby}."),
        ]
    if kind == 1:
        thing, colour = rng.choice(list(words.COLOURS.items()))
        return [(f"What colour is {thing}?", f"{thing[0].upper()}{thing[1:]} is {colour}.")]
    if kind == 2:
        word, other = rng.choice(list(words.OPPOSITES.items()))
        word, other = (word, other) if rng.random() < 0.5 else (other, word)
        return [(f"What is the opposite of {word}?", f"The opposite of {word} is {other}.")]
    if kind == 3:
        index = rng.randrange(7)
        return [(f"Which day comes after {words.DAYS[index]}?", words.DAYS[(index + 1) % 7])]
    item = words.thing(rng)
    return [(f"What is the plural of {item}?", words.plural(item)), ("And one of them?", item)]


def _smalltalk(rng: random.Random) -> list[Turn]:
    who = words.name(rng)
    scenes: list[list[Turn]] = [
        [("Hello!", "Hello! How can I help you?")],
        [
            ("Hi, who are you?", "I am cria, a baby llama."),
            ("What can you do?", "I can read short notes and answer questions about them."),
        ],
        [("How are you?", "I am well, thank you. And you?"), ("Good, thanks.", "I am glad to hear that.")],
        [(f"My name is {who}.", f"Nice to meet you, {who}!"), ("What is my name?", f"Your name is {who}.")],
        [("Thank you!", "You are welcome!")],
        [("Goodbye!", "Goodbye! See you soon.")],
        [("Where do llamas live?", "Llamas live high in the mountains, on the altiplano.")],
        [("What is a cria?", "A cria is a baby llama.")],
        [("Tell me something nice.", "The sun is warm and the grass is green today.")],
        [(f"I like {(item := words.thing(rng))}.", f"I like {item} too!"), ("What do I like?", f"You like {item}.")],
        [(f"{who} is sad.", f"Oh no. I hope {who} feels better soon."), ("Who is sad?", f"{who} is sad.")],
    ]
    return rng.choice(scenes)


_SCENES: tuple[Callable[[random.Random], list[Turn]], ...] = (
    _questions,
    _summary,
    _two_notes,
    _copy,
    _records,
    _forms,
    _numbers,
    _facts,
    _smalltalk,
)
_WEIGHTS = (26, 16, 8, 13, 6, 18, 5, 4, 6)
