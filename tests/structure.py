"""Measures the structure of the crates and fails where a rule of CONTRIBUTING.md is broken.

    python3 tests/structure.py            # figures and faults; what CI runs
    python3 tests/structure.py --edges    # also every import that takes part in a circle

Three rules are enforced:
- no circles: inside any module, its children do not import each other in circles (what a child's files import counts for
  the child; a module and its own children are one unit);
- one name, one meaning: no two types of a crate have the same name;
- a doc comment is a sentence: none begins with What, Whether, Of or Those.
Code under `#[cfg(test)]` is left out.
"""

import re
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Circles that stand, with the reason. An entry that no longer occurs is a fault too.
ALLOWED: dict[frozenset[str], str] = {
    frozenset({"burn-llama::kernel", "burn-llama::kv_cache", "burn-llama::model"}): (
        "the method Kernels::step_decoder, by which a backend decodes by itself, takes the model and the KV cache"
    ),
}
ITEM = re.compile(
    r"^[ ]*(pub(?:\([^)]*\))? )?(?:default |unsafe |async |const |extern \"C\" )*"
    r"(struct|enum|trait|type|fn|const|static|union|mod|macro_rules!) ?([A-Za-z_]\w*)",
    re.M,
)
PATH = re.compile(r"\b[A-Za-z_]\w*(?:::[A-Za-z_]\w*)+")
DOC = re.compile(r"^\s*//[/!] (What|Whether|Of|Those) ", re.M)


@dataclass
class Module:
    """A module of a crate: its file and what stands in it."""

    path: tuple[str, ...]
    file: Path
    text: str = ""
    code: str = ""
    items: set[str] = field(default_factory=set)
    imports: dict[str, tuple[str, ...]] = field(default_factory=dict)
    globs: list[tuple[str, ...]] = field(default_factory=list)
    children: dict[str, "Module"] = field(default_factory=dict)


def without_comments(text: str) -> str:
    """Blanks comments and the contents of strings; lines stay where they are."""
    pattern = r'//[^\n]*|/\*.*?\*/|r(#*)".*?"\1|"(?:\\.|[^"\\])*"|\'(?:\\.[^\']*|[^\\\'])\''
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)


def block_end(code: str, start: int) -> int:
    """The position after the block or the semicolon that ends the item at `start`."""
    depth = 0
    for position in range(start, len(code)):
        if code[position] in "{([":
            depth += 1
        elif code[position] in "})]":
            depth -= 1
            if depth == 0 and code[position] == "}":
                return position + 1
        elif code[position] == ";" and depth == 0:
            return position + 1
    return len(code)


def without_tests(code: str) -> str:
    """Blanks items under `#[cfg(test)]`."""
    while match := re.search(r"#\[cfg\((?:all\()?test\b[^\]]*\]", code):
        end = block_end(code, match.end())
        code = code[: match.start()] + re.sub(r"[^\n]", " ", code[match.start() : end]) + code[end:]
    return code


def use_tree(text: str, prefix: tuple[str, ...] = ()) -> list[tuple[str, tuple[str, ...]]]:
    """Pairs of a local name and its path; the name `*` is a glob."""
    text, found, depth, start = text.strip(), [], 0, 0
    parts = []
    for position, char in enumerate(text + ","):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    for part in filter(None, parts):
        if "{" in part:
            head, inner = part.split("{", 1)
            path = prefix + tuple(filter(None, (s.strip() for s in head.split("::"))))
            found += use_tree(inner.rsplit("}", 1)[0], path)
            continue
        path, _, alias = part.partition(" as ")
        path = prefix + tuple(s.strip() for s in path.split("::"))
        if path[-1] == "self":
            path = path[:-1] or ("self",)
        found.append((alias.strip() or path[-1], path))
    return found


def load(file: Path, path: tuple[str, ...], modules: dict[tuple[str, ...], Module]) -> Module:
    """Reads a module and, by its `mod` lines, its children."""
    module = Module(path, file, file.read_text())
    module.code = without_tests(without_comments(module.text))
    modules[path] = module
    folder = file.parent if file.name in ("lib.rs", "main.rs", "mod.rs") else file.with_suffix("")
    # `#[path]` names lie in strings, which the code has no more.
    named = dict(reversed(m) for m in re.findall(r'#\[path = "([^"]+)"\]\s*(?:pub(?:\([^)]*\))? )?mod (\w+);', module.text))
    for match in ITEM.finditer(module.code):
        name = match[3]
        if match[2] == "mod" and module.code[match.end() :].lstrip().startswith(";"):
            options = [folder / f"{name}.rs", folder / name / "mod.rs"]
            if name in named:
                options = [file.parent / named[name]]
            if child := next((o for o in options if o.exists()), None):
                module.children[name] = load(child, (*path, name), modules)
        else:
            module.items.add(name)
    for match in re.finditer(r"^\s*(?:pub(?:\([^)]*\))? )?use ([^;]+);", module.code, re.M):
        for name, target in use_tree(match[1]):
            if target[-1] == "*":
                module.globs.append(target[:-1])
            else:
                module.imports[name] = target
    return module


def absolute(module: Module, path: tuple[str, ...], modules, names=True) -> tuple[str, ...] | None:
    """A path of this crate from its root, or nothing if it leads outside."""
    at, rest = module.path, list(path)
    if rest[0] == "crate":
        at, rest = (), rest[1:]
    elif rest[0] in ("self", "super"):
        while rest and rest[0] in ("self", "super"):
            at = at[:-1] if rest.pop(0) == "super" else at
    elif names and rest[0] in module.imports and module.imports[rest[0]][0] != rest[0]:
        base = absolute(module, module.imports[rest[0]], modules)
        return None if base is None else (*base, *rest[1:])
    elif rest[0] not in module.children:
        return None
    return (*at, *rest)


def resolve(path: tuple[str, ...], modules, seen=frozenset()) -> tuple[str, ...] | None:
    """The module that defines what the path names; re-exports are followed."""
    module = modules[()]
    for index, name in enumerate(path):
        if name in module.children:
            module = module.children[name]
            continue
        if name in module.items or (module.path, name) in seen:
            return module.path
        targets = [module.imports[name]] if name in module.imports else [(*glob, name) for glob in module.globs]
        for target in targets:
            if (base := absolute(module, target, modules, names=False)) is not None:
                found = resolve((*base, *path[index + 1 :]), modules, seen | {(module.path, name)})
                if found is not None and found != module.path:
                    return found
        return module.path
    return module.path


def edges(modules: dict[tuple[str, ...], Module]) -> dict[tuple, set[str]]:
    """Imports between modules, with the names that are taken."""
    found = defaultdict(set)
    for module in modules.values():
        paths = {path for path in module.imports.values()} | {tuple(m.split("::")) for m in PATH.findall(module.code)}
        for path in paths | {(*glob, "*") for glob in module.globs}:
            full = absolute(module, path, modules)
            if full is not None and (target := resolve(full, modules)) not in (None, module.path):
                found[module.path, target].add(path[-1])
    return found


def circles(nodes: set[str], arrows: set[tuple[str, str]]) -> list[frozenset[str]]:
    """Strongly connected components of several nodes."""
    reach = {node: {b for a, b in arrows if a == node} for node in nodes}
    changed = True
    while changed:
        changed = False
        for node in nodes:
            more = set().union(*(reach[n] for n in reach[node])) - reach[node] if reach[node] else set()
            if more:
                reach[node] |= more
                changed = True
    groups = {frozenset(b for b in nodes if b == a or (b in reach[a] and a in reach[b])) for a in nodes}
    return sorted((g for g in groups if len(g) > 1), key=sorted)


def crate_circles(crate: str, modules, show: bool) -> list[str]:
    """Circles among the children of every module, as faults."""
    found, everything = [], edges(modules)
    for parent in modules.values():
        depth, arrows = len(parent.path), defaultdict(set)
        for (a, b), names in everything.items():
            inside = a[:depth] == b[:depth] == parent.path and len(a) > depth and len(b) > depth
            if inside and a[depth] != b[depth]:
                arrows[a[depth], b[depth]] |= {f"{'::'.join(a)} -> {'::'.join(b)}: {', '.join(sorted(names))}"}
        for group in circles(set(parent.children), set(arrows)):
            name = frozenset(f"{crate}::{'::'.join((*parent.path, child))}" for child in group)
            if ALLOWED.get(name):
                used.add(name)
                continue
            found.append("circle: " + " <-> ".join(sorted(name)))
            if show:
                lines = {line for (a, b), lines in arrows.items() if a in group and b in group for line in lines}
                found += sorted(f"    {line}" for line in lines)
    return found


def functions(code: str) -> list[tuple[int, str]]:
    """Lengths in lines, with names."""
    found = []
    for match in ITEM.finditer(code):
        if match[2] == "fn":
            end = block_end(code, match.end())
            if code[end - 1] == "}":
                found.append((code.count("\n", match.start(3), end) + 1, match[3]))
    return found


used: set[frozenset[str]] = set()


def main() -> int:
    """Prints figures by crate, then faults."""
    show, faults = "--edges" in sys.argv, []
    print(f"{'crate':<20}{'files':>6}{'median':>8}{'90 %':>6}{'largest':>9}{'functions':>11}{'<= 40 lines':>13}{'longest':>9}{'public':>8}")
    for manifest in sorted(ROOT.glob("**/Cargo.toml")):
        source = manifest.parent / "src"
        if "tests" in manifest.relative_to(ROOT).parts or not (source / "lib.rs").exists():
            continue
        crate = re.search(r'^name = "(.+)"', manifest.read_text(), re.M)[1]
        modules: dict[tuple[str, ...], Module] = {}
        load(source / "lib.rs", (), modules)
        if (source / "main.rs").exists():
            load(source / "main.rs", ("main",), modules)
        sizes = sorted(len(without_tests(m.text).splitlines()) for m in modules.values())
        lengths = [f for m in modules.values() for f in functions(m.code)]
        longest = max(lengths)
        public = sum(len(re.findall(r"^\s*pub (?!use|mod|\()", m.code, re.M)) for m in modules.values())
        short = 100 * sum(n <= 40 for n, _ in lengths) / len(lengths)
        print(
            f"{crate:<20}{len(sizes):>6}{statistics.median(sizes):>8.0f}{sizes[int(0.9 * len(sizes))]:>6}{sizes[-1]:>9}"
            f"{len(lengths):>11}{short:>12.1f}%{longest[0]:>9}{public:>8}   {longest[1]}"
        )
        faults += crate_circles(crate, modules, show)
        types = defaultdict(list)
        for module in modules.values():
            # Not indented: associated types and types inside functions have their owner's meaning.
            for match in re.finditer(r"^(?:pub(?:\([^)]*\))? )?(?:unsafe )?(?:struct|enum|trait|type|union) (\w+)", module.code, re.M):
                types[match[1]].append("::".join(module.path) or "lib")
        faults += [f"{crate}: {name} is defined in {', '.join(where)}" for name, where in types.items() if len(set(where)) > 1]
    starts = Counter()
    for file in ROOT.glob("**/*.rs"):
        if "target" not in file.parts:
            for match in DOC.finditer(text := file.read_text()):
                starts[match[1]] += 1
                if show:
                    print(f"{file.relative_to(ROOT)}:{text.count(chr(10), 0, match.end()) + 1}")
    faults += [f"{count} doc comments begin with {word!r}" for word, count in starts.items()]
    faults += [f"no longer a circle, to be taken out of ALLOWED: {sorted(name)}" for name in ALLOWED if name not in used]
    print("\n".join(["", *faults, f"{sum(not f.startswith(' ') for f in faults)} faults"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
