"""The command: ci/fleet/run."""

import argparse
import os
import sys
import time
import traceback

from . import cases, faults
from .scene import Scene


def run_case(scene, case, name):
    """Runs a case; whether all was well."""
    began = time.monotonic()
    try:
        stopped = case(scene) or ()
        scene.heal()
        scene.assert_well(stopped)
    except Exception:  # pylint: disable=broad-except
        traceback.print_exc()
        time.sleep(float(os.environ.get("FLEET_HOLD", "0")))
        print(f"test {name} ... FAILED", flush=True)
        return False
    print(f"test {name} ... ok ({time.monotonic() - began:.1f} s)", flush=True)
    return True


def main():
    """Runs the cases that are asked for."""
    parser = argparse.ArgumentParser(prog="ci/fleet/run")
    parser.add_argument("case", nargs="*")
    parser.add_argument("--faults", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    began = time.monotonic()
    scene = Scene()
    print(f"three nodes online and {len(scene.names)} guests at work after {time.monotonic() - began:.1f} s", flush=True)
    if asked.faults:
        hurt = faults.many(scene, asked.faults, asked.seed)
        print(f"{asked.faults} faults of seed {asked.seed}: {hurt} guests hurt, in {time.monotonic() - began:.0f} s")
        sys.exit(1 if hurt else 0)
    chosen = [case for case in cases.CASES if not asked.case or case.__name__ in asked.case]
    results = [run_case(scene, case, case.__name__) for case in chosen]
    results.append(run_case(scene, lambda scene: None, "guests_in_the_end") if not all(results) else True)
    try:
        scene.assert_journals()
        print("test journals ... ok")
        results.append(True)
    except Exception:  # pylint: disable=broad-except
        traceback.print_exc()
        print("test journals ... FAILED")
        results.append(False)
    failed = results.count(False)
    print(f"test result: {'FAILED' if failed else 'ok'}. {results.count(True)} passed; {failed} failed; "
          f"finished in {time.monotonic() - began:.1f} s")
    sys.exit(1 if failed else 0)


main()
