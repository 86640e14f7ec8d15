"""The line that `mechanic run` shows on a terminal: where it stands, and that the script's own output stays."""

import fcntl
import os
import pty
import re
import struct
import termios
import threading

import pytest

ROWS, COLUMNS = 24, 90
LINE = re.compile(r"mechanic: AdamW, step (\d+): effective lr \d\.\d\de[-+]\d\d")
TRAINING = """
import sys, time, torch
torch.set_num_threads(1)
p = torch.ones(3, requires_grad=True)
optimizer = torch.optim.AdamW([p], lr=1e-3)

def step():
    time.sleep(0.02)
    p.grad = p.detach() - 3
    optimizer.step()
"""
PRINTS = """
print("first")
for _ in range(5):
    step()
print("\\x1b[1ma part\\x1b[0m", end="")
for _ in range(5):
    step()
print(", and the rest")
"""
BAR = """
from tqdm import tqdm
for _ in tqdm(range(20), ncols=60, desc="bar", mininterval=0):
    step()
"""
ASKS = """
for _ in range(5):
    step()
print("got", input("who? "))
step()
"""
MOVES = """
for _ in range(5):
    step()
print("moving \\x1b[1;1H", end="", flush=True)
for _ in range(5):
    step()
print("moved")
"""
LONG = """
print("x" * 100, end="")
for _ in range(5):
    step()
print()
"""
FORKS = """
import os
step(), step()
child = os.fork()
if child == 0:
    step()
    print("of the child", flush=True)
    os._exit(0)
os.waitpid(child, 0)
step()
"""


class Screen:
    """What a terminal shows of the bytes that are written to it: as much as the line and these scripts need."""

    def __init__(self):
        self.lines, self.row, self.column = [""], 0, 0
        self.seen = []  # the whole screen after each part

    def write(self, text):
        for part in re.split(r"(\x1b\[[0-9;]*[A-Za-z]|[\r\n])", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.row += 1
                self.lines += [""] * (self.row == len(self.lines))
            elif part == "\x1b[A":
                self.row -= 1
            elif part == "\x1b[B":
                self.row = min(self.row + 1, len(self.lines) - 1)
            elif part == "\x1b[2K":
                self.lines[self.row] = ""
            elif part == "\x1b[K":
                self.lines[self.row] = self.lines[self.row][: self.column]
            elif part and not re.fullmatch(r"\x1b\[[0-9;]*m", part):
                assert part[0] != "\x1b", part
                old = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = old[: self.column] + part + old[self.column + len(part) :]
                self.column += len(part)
            self.seen.append("\n".join(self.lines))


@pytest.fixture
def on_a_terminal(forks):
    """Return a function that gives what `mechanic run` writes to a terminal, at which somebody answers to "who? "."""

    def on_a_terminal(script, *options):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        terminal = [os.ttyname(theirs)] * 3
        command = ["-m", "mechanic_pytorch", "run", *options, script]
        written = []
        reader = threading.Thread(target=written.extend, args=[read_and_answer(ours)])
        reader.start()
        status = forks.run_on(*terminal, command, env={"TERM": "xterm"})
        os.close(theirs)
        reader.join()
        os.close(ours)
        text = b"".join(written).decode()
        assert status == 0, text
        return text

    return on_a_terminal


def read_and_answer(terminal):
    try:
        while part := os.read(terminal, 65536):
            yield part
            if part.endswith(b"who? "):
                os.write(terminal, b"Ann\n")
    except OSError:  # so Linux says that nobody writes any more
        pass


@pytest.fixture
def shown(tmp_path, on_a_terminal):
    """Return a function that runs a script with a line that changes at every step, and gives the screen."""

    def show(code, *options):
        path = tmp_path / "script.py"
        path.write_text(TRAINING + code, encoding="utf-8")
        screen = Screen()
        screen.write(on_a_terminal(path, *(options or ("--live", "0.001"))))
        return screen

    return show


def test_the_line_stands_below_what_the_script_prints_and_goes_before_the_report(shown):
    screen = shown(PRINTS)
    steps = {int(step) for seen in screen.seen for step in LINE.findall(seen)}
    assert {1, 3, 5, 6, 8, 10} <= steps
    assert all(len(LINE.findall(seen)) <= 1 for seen in screen.seen), "one line, in the place of the one before"
    assert any(re.search(rf"^first\na part\n{LINE.pattern}$", seen, re.MULTILINE) for seen in screen.seen)
    first = screen.lines.index("first")  # below what says which optimizer is mechanized, in one line or two
    assert screen.lines[first + 1] == "a part, and the rest"
    assert not LINE.search("\n".join(screen.lines)), "it is gone"
    assert "to train without Mechanic" in "\n".join(screen.lines)


def test_a_progress_bar_stays_and_is_drawn_over(shown):
    pytest.importorskip("tqdm")
    screen = shown(BAR)
    assert sum(line.startswith("bar: ") for line in screen.lines) == 1
    assert any(re.search(rf"^bar:  50%.*\n{LINE.pattern}$", seen, re.MULTILINE) for seen in screen.seen)
    (bar,) = (line for line in screen.lines if line.startswith("bar: "))
    assert bar.startswith("bar: 100%|")


def test_a_script_that_moves_the_cursor_itself_ends_the_line(tmp_path, on_a_terminal):
    path = tmp_path / "moves.py"
    path.write_text(TRAINING + MOVES, encoding="utf-8")
    before, after = on_a_terminal(path, "--live", "0.001").split("\x1b[1;1H")
    assert LINE.search(before)
    assert not LINE.search(after)


@pytest.mark.parametrize("code", [LONG, FORKS], ids=["long", "forks"])
def test_what_the_script_prints_stays(shown, code):
    screen = shown(code)
    text = "\n".join(screen.lines)
    assert ("x" * 100 + "\n" in text) if code is LONG else ("of the child\n" in text)
    assert not LINE.search(text)


def test_a_question_and_its_answer_stay(shown):
    screen = shown(ASKS)
    assert any(LINE.search(seen) for seen in screen.seen)
    text = "\n".join(screen.lines)
    assert re.search(r"^who\? Ann\ngot Ann$", text, re.MULTILINE), text
    assert not LINE.search(text)


def test_it_may_be_turned_off(shown):
    screen = shown(PRINTS, "--live", "0")
    assert not any(LINE.search(seen) for seen in screen.seen)


def test_many_optimizers_get_one_line_that_fits(shown):
    code = "others = [torch.optim.SGD([torch.ones(i + 1, requires_grad=True)], lr=1.0) for i in range(20)]\n" + PRINTS
    screen = shown(code)
    lines = [line for seen in screen.seen for line in seen.splitlines() if line.startswith("mechanic: AdamW, step")]
    assert lines
    assert all(len(line) == COLUMNS - 1 and line.endswith("…") for line in lines)
