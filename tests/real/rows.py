"""Question and answer rows generated from a small grammar, so that no dataset is needed. Their content is invented."""

import json
import random
from pathlib import Path

CONDITIONS = ["marsh fever", "cold elbow", "night cough", "glass ankle", "Renner's rash", "dry eye", "low iron", "slow gut"]
SIGNS = ["a dull pain", "swelling", "a temperature above 38.5 °C", "itching", "tiredness", "trembling hands", "a dry mouth"]
PLACES = ["behind the ear", "in the left knee", "on both hands", "around the ribs", "under the skin", "in the lower back"]
REMEDIES = ["rest", "warm tea", "5 mg of exemplol", "a cold cloth", "iron tablets", "two weeks of light exercise", "salt water"]
TESTS = ["a blood count", "an X-ray", "a swab", "a look at the tongue", "a urine test", "an ultrasound"]
QUESTIONS = [
    "What are the symptoms of {condition}?",
    "How is {condition} treated?",
    "What causes {condition}, and who gets it?",
    "How do doctors find out whether someone has {condition} or {other}?",
]
SENTENCES = [
    "People with {condition} often notice {sign} {place}.",
    "In about {number} of 100 people there is also {sign}, mostly in the {daytime}.",
    "It is found by {test}; if that shows nothing, {test2} follows after {number} days.",
    "Most people get better with {remedy}, and {remedy2} helps against {sign}.",
    "{remedy_capital} should not be combined with {remedy2}, because {sign} can return.",
    "The cause is not known, but {condition} is more common than {other} in people over {number}.",
    "Call a doctor at once if there is {sign} {place} for more than {number} hours.",
    "Children rarely get {condition}.",
]


def answer(draw: random.Random, condition: str, other: str, sentences: int) -> str:
    """Returns an answer of `sentences` sentences."""

    def sentence() -> str:
        remedy, remedy2 = draw.sample(REMEDIES, 2)
        test, test2 = draw.sample(TESTS, 2)
        return draw.choice(SENTENCES).format(
            condition=condition,
            other=other,
            sign=draw.choice(SIGNS),
            place=draw.choice(PLACES),
            number=draw.randint(2, 90),
            daytime=draw.choice(["morning", "evening", "night"]),
            remedy=remedy,
            remedy2=remedy2,
            remedy_capital=remedy[0].upper() + remedy[1:],
            test=test,
            test2=test2,
        )

    return " ".join(sentence() for _ in range(sentences))


def make(count: int, seed: int, lengths: list[int]) -> list[dict[str, str]]:
    """Returns `count` rows; the number of sentences of each answer is drawn from `lengths`."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        condition, other = draw.sample(CONDITIONS, 2)
        question = draw.choice(QUESTIONS).format(condition=condition, other=other)
        made.append({"question": question, "answer": answer(draw, condition, other, draw.choice(lengths))})
    return made


def write(path: Path, made: list[dict[str, str]]) -> Path:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
    return path
