"""Takes the picture display.png: the display of a training run in a terminal.

    python3 -m venv /tmp/display && /tmp/display/bin/pip install pyte==0.8.2 pillow==13.0.0
    cargo build --release --workspace
    /tmp/display/bin/python apps/medqa/pictures/display.py --medqa target/release/medqa

Runs `quickstart --model tiny`, and then its recipe again in a pseudo-terminal, with a validation every 20 steps. The
last complete frame is drawn with the font of the crate `dejavu`, which the build has fetched. Needs no network and takes
two minutes on two cores.
"""

import argparse
import fcntl
import os
import pty
import struct
import subprocess
import tempfile
import termios
from pathlib import Path

import pyte
from PIL import Image, ImageDraw, ImageFont
from pyte.screens import Char

COLUMNS, LINES = 118, 40
CELL_WIDTH, CELL_HEIGHT, FONT_SIZE = 9, 19, 15
BACKGROUND = (24, 26, 31)
COLORS = {
    "default": (208, 212, 220),
    "black": (92, 99, 112),
    "red": (224, 108, 117),
    "green": (152, 195, 121),
    "brown": (229, 192, 123),
    "blue": (97, 175, 239),
    "magenta": (198, 120, 221),
    "cyan": (86, 182, 194),
    "white": (208, 212, 220),
}
# Bits of a braille character, by column and row of its dots.
BRAILLE_BITS = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]]
ENTER_ALTERNATE_SCREEN, LEAVE_ALTERNATE_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"
Frame = list[list[Char]]


def last_frame(command: list[str], folder: Path) -> Frame:
    """Runs a command in a pseudo-terminal and returns the last screen that shows the whole display."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    )
    os.close(terminal)
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    frame: Frame = []
    while True:
        try:
            data = os.read(main, 1 << 16)
        except OSError:  # the terminal is closed
            break
        if not data:
            break
        # The display asks for the position of the cursor; without an answer it does not start.
        if b"\x1b[6n" in data:
            os.write(main, f"\x1b[{screen.cursor.y + 1};{screen.cursor.x + 1}R".encode())
        # pyte has no alternate screen: what stands before it, and what follows it, is left out.
        before, entered, display = data.partition(ENTER_ALTERNATE_SCREEN)
        if entered:
            screen.reset()
        display, left, _ = (display if entered else before).partition(LEAVE_ALTERNATE_SCREEN)
        stream.feed(display)
        if is_complete(screen):
            frame = [[screen.buffer[y][x] for x in range(COLUMNS)] for y in range(LINES)]
        if left:
            screen.reset()
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    if not frame:
        raise SystemExit("expected the display of burn-train, found no frame of it")
    return frame


def is_complete(screen: pyte.Screen) -> bool:
    """Returns whether the screen shows all parts of the display."""
    text = "\n".join(screen.display)
    return all(title in text for title in ("Controls", "Metrics", "Plots", "Status", "Progress", "Valid epoch"))


def draw_cell(draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, corner: tuple[int, int], cell: Char) -> None:
    """Draws a character cell; dots, blocks and lines are drawn as shapes, so that they meet and need no font."""
    x, y = corner
    color, background = color_of(cell.fg, COLORS["default"]), color_of(cell.bg, BACKGROUND)
    if cell.reverse:
        color, background = background, color
    if background != BACKGROUND:
        draw.rectangle([x, y, x + CELL_WIDTH - 1, y + CELL_HEIGHT - 1], fill=background)
    code = ord(cell.data[0]) if cell.data else 0x20
    if 0x2800 <= code < 0x2900:
        for column, bits in enumerate(BRAILLE_BITS):
            for row, bit in enumerate(bits):
                if (code - 0x2800) & bit:
                    left, top = x + 1 + 4 * column, y + 2 + row * CELL_HEIGHT // 4
                    draw.rectangle([left, top, left + 2, top + 2], fill=color)
    elif 0x2588 <= code <= 0x258F:  # the left eighths of a block
        width = CELL_WIDTH * (0x2590 - code) // 8
        draw.rectangle([x, y, x + width - 1, y + CELL_HEIGHT - 1], fill=color)
    elif cell.data in "┌┐└┘─│":
        draw_box(draw, cell.data, (x, y), color)
    elif code > 0x20:
        draw.text((x, y + 1), cell.data, font=font, fill=color)


def draw_box(draw: ImageDraw.ImageDraw, character: str, corner: tuple[int, int], color: tuple[int, int, int]) -> None:
    """Draws a line of a box from the middle of its cell to the edges that it meets."""
    x, y = corner
    middle_x, middle_y = x + CELL_WIDTH // 2, y + CELL_HEIGHT // 2
    ends = {
        "left": (x, middle_y),
        "right": (x + CELL_WIDTH, middle_y),
        "up": (middle_x, y),
        "down": (middle_x, y + CELL_HEIGHT),
    }
    meets = {"┌": "right down", "┐": "left down", "└": "right up", "┘": "left up", "─": "left right", "│": "up down"}
    for edge in meets[character].split():
        draw.line([(middle_x, middle_y), ends[edge]], fill=color)


def color_of(name: str, default: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns the color that pyte names, or the default."""
    if name == "default":
        return default
    if name in COLORS or (name := name.removeprefix("bright")) in COLORS:
        return COLORS[name]
    return tuple(int(name[i : i + 2], 16) for i in (0, 2, 4))


def font_file() -> Path:
    """Returns the path of the font in cargo's registry."""
    home = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
    found = sorted(home.glob("registry/src/*/dejavu-*/assets/**/DejaVuSansMono.ttf"))
    if not found:
        raise SystemExit("expected the crate dejavu in cargo's registry: build medqa first, or name a font with --font")
    return found[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--medqa", type=Path, required=True, help="the built program")
    parser.add_argument("--font", type=Path, help="a monospaced TrueType font")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("display.png"))
    arguments = parser.parse_args()
    medqa, font = arguments.medqa.resolve(), ImageFont.truetype(arguments.font or font_file(), FONT_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([medqa, "quickstart", "--model", "tiny"], cwd=folder, check=True, stdin=subprocess.DEVNULL)
        command = [str(medqa), "train", "runs/quickstart/recipe.toml", "--set", "train.eval_every=20", "--dir", "again"]
        frame = last_frame(command, Path(folder))
    image = Image.new("RGB", (COLUMNS * CELL_WIDTH, LINES * CELL_HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for y, line in enumerate(frame):
        for x, cell in enumerate(line):
            draw_cell(draw, font, (x * CELL_WIDTH, y * CELL_HEIGHT), cell)
    # A palette keeps the file small.
    image.quantize(64).save(arguments.out, optimize=True)
    print(f"{arguments.out}: {arguments.out.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
