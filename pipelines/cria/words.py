"""The vocabulary of cria's small world. Lists are data; invented names come from syllables, so that copying must be learned."""

import random

NAMES = (
    "Ada Ali Amir Ana Anna Arjun Ben Bo Carla Chen Clara Dan Diego Ed Elena Ella Emil Emma Eva Fatima Finn Gita Hana Hugo Ida Ines Iris "
    "Ivan Jack Jan Jin Joao Jonas Julia Kai Kofi Lara Lea Leo Lena Lina Liu Luca Lucy Maria Mark Maya Mei Mia Mila Milo Mina Mona Nadia Nils "
    "Nina Noah Nora Olga Omar Oscar Otto Paul Pedro Pia Priya Rosa Ravi Rita Ruth Sam Sara Sofia Sven Tara Tim Tom Uma Vera Wei Yara Yusuf Zoe"
).split()
ITEMS = (
    "apple pear plum melon lemon cake pie bun roll muffin cookie pretzel bagel soup salad sandwich burger wrap taco curry stew noodle bowl "
    "pizza pasta lasagna omelette pancake waffle tea coffee juice smoothie cocoa lamp chair desk shelf rug mug cup plate bowl kettle pan pot "
    "knife spoon basket box bag candle clock mirror vase scarf hat coat shirt sock glove boot shoe belt book map card pen pencil notebook "
    "puzzle kite ball drum flute guitar doll robot train truck boat bike bell key lock rope ladder hammer brush bucket broom blanket pillow towel"
).split()
KINDS = (
    "red blue green yellow black white brown pink grey orange purple golden silver wooden cotton woolen paper glass copper clay cheese mushroom "
    "tomato spinach onion pepper chicken fish bean rice corn carrot pumpkin vanilla chocolate cherry ginger honey mint almond walnut coconut "
    "spicy sweet plain warm cold fresh little round soft travel garden kitchen winter summer"
).split()
SIZES = ("small", "medium", "large")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
STREETS = "Oak Elm Pine Maple Cedar Birch Mill Hill Lake River Park Church School Garden Station Market Bridge Castle King Queen Rose Stone".split()
WAYS = ("Street", "Road", "Lane", "Avenue", "Way", "Square")
ANIMALS = {
    "dog": ("barks", "puppy"),
    "cat": ("meows", "kitten"),
    "cow": ("moos", "calf"),
    "sheep": ("bleats", "lamb"),
    "duck": ("quacks", "duckling"),
    "horse": ("neighs", "foal"),
    "lion": ("roars", "cub"),
    "llama": ("hums", "cria"),
    "bird": ("sings", "chick"),
    "frog": ("croaks", "tadpole"),
    "pig": ("oinks", "piglet"),
    "goat": ("bleats", "kid"),
}
COLOURS = {
    "snow": "white",
    "grass": "green",
    "the sky": "blue",
    "a banana": "yellow",
    "coal": "black",
    "a lemon": "yellow",
    "milk": "white",
    "a tomato": "red",
    "a carrot": "orange",
    "the sea": "blue",
    "a leaf": "green",
    "chocolate": "brown",
}
OPPOSITES = {
    "big": "small",
    "hot": "cold",
    "day": "night",
    "up": "down",
    "left": "right",
    "open": "closed",
    "fast": "slow",
    "happy": "sad",
    "old": "young",
    "full": "empty",
    "wet": "dry",
    "early": "late",
    "light": "dark",
    "hard": "soft",
    "near": "far",
    "loud": "quiet",
}
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
KEYS = (
    "address amount area body box buyer case city client code colour cost count customer date day delivery detail entry event field file form goods "
    "group guest hour house id item job key kind label level line list location mark member model month name note number object option order owner "
    "pack page part person phone piece place plan point post price product quantity rank reason record road room row sender service shape share shop "
    "side size sort source space speed stage start state step stock store street style subject sum table tag target task team term test text thing "
    "time title token tool total town type unit use user value visit ware way week weight who width word work year zone"
).split()
_SYLLABLES = "ba be bi bo da de do fa fi ga go ha ka ke ki ko la le li lo ma me mi mo na ne no pa pe po ra re ri ro sa se so ta te ti to va vi wa ya yo za zu".split()


def name(rng: random.Random) -> str:
    """A first name; one in three is invented."""
    return rng.choice(NAMES) if rng.random() < 0.66 else invented(rng).capitalize()


def invented(rng: random.Random) -> str:
    """A word that nobody knows, of two to four syllables."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.choice((2, 2, 3, 4))))


def thing(rng: random.Random) -> str:
    """An item, mostly with a kind before it: `mushroom pizza`."""
    item = rng.choice(ITEMS) if rng.random() < 0.9 else invented(rng)
    return item if rng.random() < 0.2 else f"{rng.choice(KINDS) if rng.random() < 0.92 else invented(rng)} {item}"


def address(rng: random.Random) -> str:
    street = rng.choice(STREETS) if rng.random() < 0.75 else invented(rng).capitalize()
    return f"{rng.randint(1, 99 if rng.random() < 0.8 else 999)} {street} {rng.choice(WAYS)}"


def plural(word: str) -> str:
    """English plural of the last word, for the words in this file."""
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    if word.endswith("fe"):
        return word[:-2] + "ves"
    return word[:-2] + "ves" if word.endswith("lf") else word + "s"
