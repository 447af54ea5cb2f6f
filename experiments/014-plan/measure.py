"""Jobs beside their plans: CPU seconds of all processes, and the largest resident memory of one.

python measure.py FOLDER [CASE ...]     # a JSON line a case into FOLDER/measured.jsonl; one thread
python measure.py FOLDER --replan [CASE ...]    # plans what was measured once more, by the code as it is now
python measure.py FOLDER --table        # and into results.json beside this file

Each case is planned with a fresh probe and then run at once, at full length and shorter; the difference of the two is
what its steps or phases cost, the rest is fixed. CPU seconds do not count what others on the machine get, but a core
that is shared runs slower, which they do not correct.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("folder", type=Path)
p.add_argument("cases", nargs="*")
p.add_argument("--data", type=Path, default=Path("../shared/data"), help="where neox_stories_nano and tinystories are")
p.add_argument("--saes", type=Path, help="a run of saerl train-sae on the planted model")
p.add_argument("--nano-saes", type=Path, help="and on nano")
p.add_argument("--replan", action="store_true")
p.add_argument("--table", action="store_true")
a = p.parse_intermixed_args()  # cases may follow options

NANO = (
    f"model=local model.path={a.data}/neox_stories_nano data=text data.path={a.data}/tinystories/stories.jsonl"
    " data.context_size=192"
)
SHORT = "evaluation.every=0 snapshots=0 evaluation.samples=64"
FEW = "data.max_documents=4000"
REWARD = "reward=lexicon reward.parts.lexicon.words={happy:1.0,fun:1.0} prompts.tokens=8"
CASES: dict[str, dict[str, Any]] = {
    "lm": {"words": "train-lm model.planted.documents=4000 model.planted.steps={}", "long": 100, "short": 30},
    "sae, 3 sites": {"words": "train-sae eval_tokens=10000 sae.tokens={}", "long": 368640, "short": 122880},
    "sae, 6 of a sweep": {
        "words": "train-sae site=mlp_out.1 sweep=[{k:[8,32,64]},{sae:relu,l1:[2,5]},{sae:jumprelu}]"
        " eval_tokens=10000 sae.tokens={}",
        "long": 122880,
        "short": 61440,
    },
    "sparse_coeffs": {
        "words": f"rlhf --sparse-coeffs adapter.saes={a.saes} {SHORT} algo.phases={{}}", "long": 24, "short": 4,
        "length": 24,
    },
    "full": {"words": "rlhf evaluation.every=0 snapshots=0 algo.phases={}", "long": 8, "short": 2, "length": 24},
    "nano sae, wide": {
        "words": f"train-sae {NANO} site=mlp_out.2 sae.expansion=64 eval_tokens=10000 sae.tokens={{}}",
        "long": 245760,
        "short": 81920,
    },
    "nano sparse_coeffs": {
        "words": f"rlhf --sparse-coeffs adapter.saes={a.nano_saes} {NANO} {SHORT} {REWARD} algo.max_new_tokens=48"
        " algo.phases={}",
        "long": 8,
        "short": 2,
    },
    "nano full": {
        "words": f"rlhf {NANO} {SHORT} {REWARD} algo.max_new_tokens=48 algo.phases={{}}", "long": 8, "short": 2,
    },
    "sft full": {
        "words": f"rlhf algo=sft {SHORT} {FEW} algo.phases={{}}", "long": 12, "short": 2, "length": 24,
    },
    "dpo sparse_coeffs": {
        "words": f"rlhf --sparse-coeffs adapter.saes={a.saes} algo=dpo {SHORT} {FEW} algo.pairs.count=512"
        " algo.phases={}",
        "long": 12,
        "short": 2,
        "length": 24,
    },
    "rwr sparse_coeffs": {
        "words": f"rlhf --sparse-coeffs adapter.saes={a.saes} algo=rwr {SHORT} {FEW} algo.draws=1024 algo.phases={{}}",
        "long": 12,
        "short": 2,
        "length": 24,
    },
    "eval-sae, controls": {
        "words": f"eval-sae saes={a.saes} data.max_documents=4000 controls=true control_tokens=40000 probe_tokens=4000"
        " eval_tokens={}",
        "long": 12000,
        "short": 4000,
    },
    "nano sft sparse_coeffs": {
        "words": f"rlhf --sparse-coeffs adapter.saes={a.nano_saes} {NANO} {SHORT} {REWARD} algo=sft"
        " algo.max_new_tokens=48 algo.phases={}",
        "long": 8,
        "short": 2,
    },
    "nano rwr full": {
        "words": f"rlhf {NANO} {SHORT} {REWARD} algo=rwr algo.draws=512 algo.max_new_tokens=48 algo.phases={{}}",
        "long": 12,
        "short": 2,
    },
    "nano eval-sae, wide": {
        "words": f"eval-sae saes={a.nano_saes} eval_tokens={{}}", "long": 40000, "short": 10000,
    },
}  # fmt: skip
"""`length`: tokens of a completion, known from earlier runs; elsewhere none ends early."""
KEPT = ("seconds", "peak_bytes", "peak_phase", "stays_bytes", "phases", "pieces")
FIXED = "launch.cpu=true launch.threads=1"


def command(*words: str) -> list[str]:
    """A command of saerl."""
    return [sys.executable, "-m", "saerl_cli.cli", *words]


def run(words: list[str], folder: Path) -> dict[str, float]:
    """CPU seconds of a command and all its processes, and the largest resident memory of one, bytes."""
    with (folder.with_suffix(".log")).open("w") as log:
        started = time.monotonic()
        job = subprocess.Popen(command(*words, f"hydra.run.dir={folder}"), stdout=log, stderr=log)
        _, status, used = os.wait4(job.pid, 0)
    if status:
        raise SystemExit(f"{folder} failed: {folder.with_suffix('.log').read_text()[-500:]}")
    seconds = time.monotonic() - started
    return {"cpu": used.ru_utime + used.ru_stime, "resident": used.ru_maxrss * 1024.0, "wall": seconds}


def plan(words: list[str], case: dict[str, Any], again: bool) -> dict[str, Any]:
    """What `saerl plan` says."""
    length = ["--length", str(case["length"])] if "length" in case else []
    asked = command("plan", *words, "--json", *length, *(["--again"] if again else []))
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-500:])
    return json.loads(done.stdout)


def measure(name: str) -> None:
    """Plan and run a case at both lengths."""
    case, found = CASES[name], {}
    for which in ("short", "long"):
        words = [*case["words"].replace("{}", str(case[which])).split(), *FIXED.split()]
        planned = plan(words, case, again=which == "short")
        folder = a.folder / f"{name.replace(' ', '-').replace(',', '')}-{which}-{time.time_ns()}"
        found[which] = {
            "planned": {key: planned[key] for key in KEPT},
            "measured": run(words, folder),
        }
    load = os.getloadavg()[0]
    with (a.folder / "measured.jsonl").open("a") as file:
        file.write(json.dumps({"case": name, "load": load, **found}) + "\n")
    print(*ratios(name, [found]).items(), sep="\n", flush=True)


def replan(name: str) -> None:
    """Plan a case once more beside what was measured, probed afresh."""
    case, found = CASES[name], {}
    for which in ("short", "long"):
        words = [*case["words"].replace("{}", str(case[which])).split(), *FIXED.split()]
        planned = plan(words, case, again=which == "short")
        found[which] = {key: planned[key] for key in KEPT}
    with (a.folder / "replanned.jsonl").open("a") as file:
        file.write(json.dumps({"case": name, "planned": found}) + "\n")


def lines_of(name: str) -> list[dict[str, Any]]:
    """The lines of a file; none when it is not there."""
    file = a.folder / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def ratios(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Predicted over measured of a case, each the smallest of its rounds."""

    def least(which: str, side: str, key: str) -> float:
        return min(one[which][side][key] for one in rounds)

    cpu = {w: (least(w, "planned", "seconds"), least(w, "measured", "cpu")) for w in ("short", "long")}
    libraries = min(one["long"]["planned"]["stays_bytes"]["libraries"] for one in rounds)
    peak = least("long", "planned", "peak_bytes"), least("long", "measured", "resident")
    steps = [long - short for long, short in zip(cpu["long"], cpu["short"], strict=True)]
    return {
        "name": name,
        "seed": 0,
        "rounds": len(rounds),
        "seconds_predicted": cpu["long"][0],
        "seconds_measured": cpu["long"][1],
        "seconds_ratio": cpu["long"][0] / cpu["long"][1],
        "steps_predicted": steps[0],
        "steps_measured": steps[1],
        "steps_ratio": steps[0] / steps[1],
        "peak_mib_predicted": peak[0] / 2**20,
        "peak_mib_measured": peak[1] / 2**20,
        "peak_ratio": peak[0] / peak[1],
        "above_libraries_mib_predicted": (peak[0] - libraries) / 2**20,
        "above_libraries_mib_measured": (peak[1] - libraries) / 2**20,
        "above_libraries_ratio": (peak[0] - libraries) / (peak[1] - libraries),
    }


def table() -> None:
    """All rounds of all cases as the card's results; cases that are not in the folder stay as they are."""
    lines, later = lines_of("measured.jsonl"), {line["case"]: line["planned"] for line in lines_of("replanned.jsonl")}
    for line in lines:
        for which in ("short", "long"):
            line[which]["planned"] = later.get(line["case"], {}).get(which) or line[which]["planned"]
            line[which]["planned"].pop("pieces", None)
            line["planned"] = "later" if line["case"] in later else "at once"
    file = Path(__file__).with_name("results.json")
    record = json.loads(file.read_text()) if file.is_file() else {}
    new = {line["case"] for line in lines}
    lines = [line for line in record.get("rounds", []) if line["case"] not in new] + lines
    names = list(dict.fromkeys(line["case"] for line in lines))
    runs = [ratios(name, [line for line in lines if line["case"] == name]) for name in names]
    file.write_text(json.dumps(record | {"runs": runs, "rounds": lines}, indent=1) + "\n")
    for run in runs:
        print(run["name"], *(f"{key} {run[key]:.2f}" for key in run if key.endswith("ratio")), sep="  ")


if a.table:
    table()
else:
    a.folder.mkdir(parents=True, exist_ok=True)
    for case in a.cases or CASES:
        (replan if a.replan else measure)(case)
