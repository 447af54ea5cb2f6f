"""Jobs beside their plans: CPU seconds of all processes, and the largest resident memory of one.

python measure.py FOLDER [CASE ...]     # a JSON line a case into FOLDER/measured.jsonl; one thread
python measure.py FOLDER --table        # and into results.json beside this file

Each case is planned with fresh short runs and then run at once. CPU seconds do not count what others on the machine
get, but a core that is shared runs slower, which they do not correct.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from saerl_cli.plan.probe import watched

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("folder", type=Path)
p.add_argument("cases", nargs="*")
p.add_argument("--data", type=Path, default=Path("../shared/data"), help="where neox_stories_nano and tinystories are")
p.add_argument("--saes", type=Path, help="a run of saerl train-sae on the planted model")
p.add_argument("--nano-saes", type=Path, help="and on nano")
p.add_argument("--table", action="store_true")
a = p.parse_intermixed_args()  # cases may follow options

NANO = (
    f"model=local model.path={a.data}/neox_stories_nano data=text data.path={a.data}/tinystories/stories.jsonl"
    " data.context_size=192"
)
SHORT = "evaluation.every=0 snapshots=0 evaluation.samples=64"
FEW = "data.max_documents=4000"
REWARD = "reward=lexicon reward.parts.lexicon.words={happy:1.0,fun:1.0} prompts.tokens=8 algo.max_new_tokens=48"
COEFFS = f"rlhf --sparse-coeffs adapter.saes={a.saes} {SHORT}"
NANO_COEFFS = f"rlhf --sparse-coeffs adapter.saes={a.nano_saes} {NANO} {SHORT} {REWARD}"
SWEEP = "sweep=[{k:[8,32,64]},{sae:relu,l1:[2,5]},{sae:jumprelu}]"
CASES = {
    "lm": "train-lm model.planted.documents=4000 model.planted.steps=100",
    "sae, 3 sites": "train-sae eval_tokens=10000 sae.tokens=368640",
    "sae, 6 of a sweep": f"train-sae site=mlp_out.1 {SWEEP} eval_tokens=10000 sae.tokens=122880",
    "sparse_coeffs": f"{COEFFS} algo.phases=24",
    "full": "rlhf evaluation.every=0 snapshots=0 algo.phases=8",
    "nano sae, wide": f"train-sae {NANO} site=mlp_out.2 sae.expansion=64 eval_tokens=10000 sae.tokens=245760",
    "nano sparse_coeffs": f"{NANO_COEFFS} algo.phases=8",
    "nano full": f"rlhf {NANO} {SHORT} {REWARD} algo.phases=8",
    "sft full": f"rlhf algo=sft {SHORT} {FEW} algo.phases=12",
    "dpo sparse_coeffs": f"{COEFFS} algo=dpo {FEW} algo.pairs.count=512 algo.phases=12",
    "rwr sparse_coeffs": f"{COEFFS} algo=rwr {FEW} algo.draws=1024 algo.phases=12",
    "eval-sae, controls": f"eval-sae saes={a.saes} data.max_documents=4000 controls=true control_tokens=40000"
    " probe_tokens=4000 eval_tokens=12000",
    "nano sft sparse_coeffs": f"{NANO_COEFFS} algo=sft algo.phases=8",
    "nano rwr full": f"rlhf {NANO} {SHORT} {REWARD} algo=rwr algo.draws=512 algo.phases=12",
    "nano eval-sae, wide": f"eval-sae saes={a.nano_saes} eval_tokens=40000",
}
FIXED = ["launch.cpu=true", "launch.threads=1"]
KEPT = ("seconds", "cpu_seconds", "peak_bytes", "peak_phase", "phases")
LIBRARIES = "import accelerate, peft, torch, transformers, trl, saerl_cli.rl.build, saerl_cli.sae.train; "
HIGH_WATER = "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"


def output(*command: str) -> str:
    """What a command of Python prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-500:])
    return done.stdout


def measure(name: str) -> None:
    """Plan a case, then run it."""
    words = [*CASES[name].split(), *FIXED]
    planned = json.loads(output("-m", "saerl_cli.cli", "plan", *words, "--json", "--again"))
    run = watched(words, a.folder / f"{name.replace(' ', '-').replace(',', '')}-{time.time_ns()}", {})
    marks = run.pop("marks")
    marks = marks[:-1] if words[0] == "rlhf" else marks  # the last phase has a look at the policy beside
    line = {
        "case": name,
        "load": os.getloadavg()[0],
        "planned": {key: planned[key] for key in KEPT},
        "measured": {
            "cpu": run["end"][1],
            "wall": run["end"][0],
            "resident": run["peak"],
            "steps": marks[-1][0] - marks[0][0] if marks else 0,
            "steps_cpu": marks[-1][2] - marks[0][2] if marks else 0.0,
        },
        "libraries": 1024 * int(output("-c", LIBRARIES + HIGH_WATER)),
    }
    with (a.folder / "measured.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(*ratios(line).items(), sep="\n", flush=True)


def ratios(line: dict[str, Any]) -> dict[str, Any]:
    """Predicted over measured of a case; steps or phases are those between the first and the last line of metrics."""
    planned, measured, libraries = line["planned"], line["measured"], line["libraries"]
    repeated = next((one["cpu_seconds"] for one in planned["phases"] if one["name"] in ("steps", "phases")), 0.0)
    steps = repeated * measured["steps"]
    peaks = planned["peak_bytes"], measured["resident"]
    return {
        "name": line["case"],
        "seed": 0,
        "seconds_predicted": planned["cpu_seconds"],
        "seconds_measured": measured["cpu"],
        "seconds_ratio": planned["cpu_seconds"] / measured["cpu"],
        "steps_predicted": steps,
        "steps_measured": measured["steps_cpu"],
        "steps_ratio": steps / measured["steps_cpu"] if steps else None,
        "peak_mib_predicted": peaks[0] / 2**20,
        "peak_mib_measured": peaks[1] / 2**20,
        "peak_ratio": peaks[0] / peaks[1],
        "above_libraries_ratio": (peaks[0] - libraries) / (peaks[1] - libraries),
    }


def table() -> None:
    """The last round of every case as the card's results; cases that are not in the folder stay as they are."""
    file = Path(__file__).with_name("results.json")
    record = json.loads(file.read_text()) if file.is_file() else {}
    lines = {line["case"]: line for line in record.get("rounds", [])}
    lines |= {line["case"]: line for line in map(json.loads, (a.folder / "measured.jsonl").read_text().splitlines())}
    runs = [ratios(lines[name]) for name in CASES if name in lines]
    file.write_text(json.dumps(record | {"runs": runs, "rounds": list(lines.values())}, indent=1) + "\n")
    for run in runs:
        print(run["name"], *(f"{key} {run[key]:.2f}" for key in run if key.endswith("ratio") and run[key]), sep="  ")


if a.table:
    table()
else:
    a.folder.mkdir(parents=True, exist_ok=True)
    for case in a.cases or CASES:
        measure(case)
