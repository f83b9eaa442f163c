"""Compares token ids on whole vocabularies with llama.cpp, by hand.

    cargo build --release -p burn-llama --example tokenize
    python tests/real/vocabularies.py --tokenize target/release/examples/tokenize --models llama.cpp/models
    ... --tekken tekken_240911.json

`--models` is a folder with llama.cpp's `ggml-vocab-NAME.gguf` and, for some, `.inp` (texts) and `.out` (their ids); the
source package of llama-cpp-python has it as `vendor/llama.cpp/models`. For every vocabulary, ids of these texts must
equal the file's, and ids of random texts those of llama.cpp. Then every name of pre-tokenization rules splits random
texts on a vocabulary with a merge for every pair of bytes, which shows every difference in splitting. `--tekken` takes a vocabulary of the package
mistral-common, which must be installed: ids under the rules `tekken` must equal llama.cpp's; how many texts Mistral's
own tokenizer splits otherwise is only counted.
"""

import argparse
import base64
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import llama  # noqa: F401, it keeps llama.cpp away from AMX
import llama_cpp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "fixtures"))
import make_pre_tokenizers as rules

SEPARATOR = "\n__ggml_vocab_test__\n"
# Characters of every kind that a rule tells apart; random texts are made of them.
CHARACTERS = [
    *"aBsStTdDmrReEvlLxyZ",
    *"0123456789",
    *"'''     \t\n\r",
    *"!-/.,;:?()[]{}$+<=>^`|~#@_\"\\&*%",
    *"éÉßœŒſǅµªʔʰЖжΩωქႠבش",
    *"漢字一龥かカ가힣ㄱㄅ豈々〆",
    *"\u0301\u0308\u0e31\u094d\u20dd",
    *"٣½Ⅳ²①𝟘五",
    *"\u00a0\u0085\u2003\u2028\u3000\u1680",
    *"‘’“”…—€£©→！，：。、（）〜",
    *"ไทยမြန်मा",
    *"👍🏽👩\u200d\ufe0f\u200b\ufeff\ufffd\ue000\u0001\u007f\U0010ffff",
]
PIECES = ["'s", "'LL", "'Ve", "  ", "   ", "\r\n", "\n\n", " the", "HTTP", "get", "123", "4567", " 89", "IMGIMGAZ", "//"]


def random_texts(count: int, seed: int) -> list[str]:
    """Returns short random texts, each from a few kinds of characters."""
    generator = random.Random(seed)
    texts = []
    for _ in range(count):
        kinds = generator.sample(CHARACTERS, generator.randint(2, 12)) + generator.sample(PIECES, 2)
        texts.append("".join(generator.choices(kinds, k=generator.randint(1, 40))))
    return texts


def texts_of(inputs: Path) -> list[str]:
    """Returns the texts of an `.inp` file; none if it does not exist. A separator follows the last text."""
    texts = inputs.read_bytes().decode().split(SEPARATOR) if inputs.exists() else []
    return texts[:-1] if texts[-1:] == [""] else texts


class Comparison:
    """Our program beside llama.cpp, with the count of faults."""

    def __init__(self, program: Path):
        self.program = program
        self.faults = 0

    def ours(self, model: Path, texts: list[str]) -> list[list[int]] | None:
        """Returns our ids of texts; prints the error and returns nothing if the file is refused."""
        done = subprocess.run([self.program, model], input=json.dumps(texts), capture_output=True, text=True)
        if done.returncode != 0:
            print(f"{model.name}: refused, {done.stderr.strip().splitlines()[-1][:160]}")
            return None
        return json.loads(done.stdout)

    def check(self, what: str, texts: list[str], found: list[list[int]], expected: list[list[int]]) -> None:
        """Prints how many texts have the same ids, and the first that has not."""
        wrong = [case for case in zip(texts, expected, found, strict=True) if case[1] != case[2]]
        print(f"{what}: {len(texts) - len(wrong)} of {len(texts)} texts")
        if wrong:
            self.faults += len(wrong)
            text, theirs, ids = min(wrong, key=lambda case: len(case[0]))
            print(f"  {text!r}\n  expected {theirs}\n  found    {ids}")

    def vocabulary(self, model: Path, count: int) -> None:
        """Compares one vocabulary of llama.cpp's folder."""
        given = texts_of(Path(f"{model}.inp"))
        texts = given + random_texts(count, seed=1)
        ours = self.ours(model, texts)
        if ours is None:
            return
        if given:
            lines = Path(f"{model}.out").read_text().splitlines()
            expected = [[int(token) for token in line.split()] for line in lines]
            self.check(f"{model.name}, its texts", given, ours[: len(given)], expected)
        self.check(f"{model.name}, llama.cpp", texts, ours, theirs(model, texts))

    def names(self, count: int) -> None:
        """Compares every name of rules on the vocabulary of the fixtures."""
        tokens, merges = pairs_of_bytes()
        with tempfile.TemporaryDirectory() as folder:
            for number, name in enumerate(" ".join(rules.RULES).split()):
                path = Path(folder) / f"{name}.gguf"
                rules.write(str(path), name, tokens, merges)
                texts = random_texts(count, seed=2 + number)
                ours = self.ours(path, texts)
                if ours is None:
                    self.faults += 1
                else:
                    self.check(name, texts, ours, theirs(path, texts))

    def tekken(self, source: Path, texts: list[str]) -> None:
        """Compares a vocabulary of mistral-common under the rules `tekken`."""
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        tokenizer = Tekkenizer.from_file(source)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tekken.gguf"
            rules.write(str(path), "tekken", *tekken_vocabulary(source, tokenizer))
            ours = self.ours(path, texts)
            self.check(f"{source.name}, llama.cpp", texts, ours, theirs(path, texts))
        mistral = [tokenizer.encode(text, bos=False, eos=False) for text in texts]
        other = [text for text, ids, own in zip(texts, mistral, ours, strict=True) if ids != own]
        print(f"{source.name}: Mistral's own tokenizer splits {len(other)} of {len(texts)} texts otherwise")
        for text in sorted(other, key=len)[:5]:
            print(f"  {text!r}")


def alphabet() -> list[str]:
    """Returns the character that stands for each byte in byte-level tokens."""
    printable = [byte for byte in range(256) if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte]
    other = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + other.index(byte)) for byte in range(256)]


def pairs_of_bytes() -> tuple[list[str], list[str]]:
    """Returns a vocabulary of bytes, of all pairs of bytes in a random order of merging, and of words without merges."""
    pairs = [(left, right) for left in alphabet() for right in alphabet()]
    random.Random(0).shuffle(pairs)
    words = ["HTTP", "get", "123", "Ġthe", "ĠĠĠ", "'LL"]
    return ["<s>", "</s>", *alphabet(), *map("".join, pairs), *words], [" ".join(pair) for pair in pairs]


def tekken_vocabulary(source: Path, tokenizer) -> tuple[list[str], list[str]]:
    """Returns the tokens of Mistral's file in the byte-level alphabet, and the merges that their ranks imply."""
    letters = alphabet()
    special = tokenizer.num_special_tokens
    content = json.loads(source.read_text())["vocab"][: tokenizer.n_words - special]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in content}
    merges = []
    for token, rank in ranks.items():
        # The pair that byte pair encoding of the token itself would merge last; others never form it.
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:])]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[best] >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(" ".join("".join(letters[byte] for byte in part) for part in parts))
    names = [f"<special_{index}>" for index in range(special)]
    return names + ["".join(letters[byte] for byte in token) for token in ranks], merges


def theirs(model: Path, texts: list[str]) -> list[list[int]]:
    """Returns llama.cpp's ids of texts."""
    vocabulary = llama_cpp.Llama(model_path=str(model), vocab_only=True, verbose=False)
    return [vocabulary.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenize", type=Path, required=True, help="the example `tokenize` of burn-llama")
    parser.add_argument("--models", type=Path, help="folder with ggml-vocab-*.gguf")
    parser.add_argument("--tekken", type=Path, help="a tekken JSON file of mistral-common")
    parser.add_argument("--texts", type=int, default=500, help="random texts per vocabulary and name")
    arguments = parser.parse_args()
    comparison = Comparison(arguments.tokenize)
    models = sorted(arguments.models.glob("ggml-vocab-*.gguf")) if arguments.models else []
    for model in models:
        comparison.vocabulary(model, arguments.texts)
    comparison.names(arguments.texts)
    if arguments.tekken:
        given = texts_of(arguments.models / "ggml-vocab-llama-bpe.gguf.inp") if arguments.models else []
        comparison.tekken(arguments.tekken, given + random_texts(arguments.texts, seed=1))
    print("no difference" if comparison.faults == 0 else f"{comparison.faults} texts differ")
    return int(comparison.faults > 0)


if __name__ == "__main__":
    sys.exit(main())
