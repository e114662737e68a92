"""The command: ci/fleet/run."""

import argparse
import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

from . import cases, faults, figures, tools
from .scene import LARGE, Scene


def succeeds(name, test):
    """Runs a test, and says in the form of cargo's what came of it."""
    began = time.monotonic()
    try:
        test()
    except Exception:  # pylint: disable=broad-except
        # In one piece, because tests run beside each other.
        print(f"{traceback.format_exc()}test {name} ... FAILED", flush=True)
        time.sleep(float(os.environ.get("FLEET_HOLD", "0")))
        return False
    print(f"test {name} ... ok ({time.monotonic() - began:.1f} s)", flush=True)
    return True


def run_case(scene, case):
    """Runs a case, and looks at all guests after it. Whether all was well."""

    def test():
        stopped = case(scene) or ()
        if isinstance(stopped, tuple) and stopped:
            stopped, told = stopped
            print(told, flush=True)
        scene.heal()
        scene.assert_well(stopped)

    return succeeds(case.__name__, test)


def main():
    """Runs the cases that are asked for."""
    parser = argparse.ArgumentParser(prog="ci/fleet/run")
    parser.add_argument("case", nargs="*", help="cases to run; all without one")
    parser.add_argument("--faults", type=int, default=0, help="how many faults to try in the place of the cases")
    parser.add_argument("--seed", type=int, default=1, help="which faults")
    parser.add_argument("--figures", action="store_true", help="measure how long moves take, in the place of the cases")
    asked = parser.parse_args()
    began = time.monotonic()
    scene = Scene(LARGE) if asked.figures else Scene()
    print(f"three nodes online and {len(scene.names)} guests at work after {time.monotonic() - began:.1f} s", flush=True)
    if asked.figures:
        figures.show(scene)
        return
    if asked.faults:
        hurt = faults.many(scene, asked.faults, asked.seed)
        print(f"{asked.faults} faults of seed {asked.seed}: {hurt} guests hurt, in {time.monotonic() - began:.0f} s")
        sys.exit(1 if hurt else 0)

    def chosen(of):
        return [case for case in of if not asked.case or case.__name__ in asked.case]

    with ThreadPoolExecutor(1) as beside:
        tried = [beside.submit(succeeds, tool.__name__, lambda tool=tool: tool(scene)) for tool in chosen(tools.TOOLS)]
        results = [run_case(scene, case) for case in chosen(cases.GENTLE)]
        results += [tool.result() for tool in tried]
    results += [run_case(scene, case) for case in chosen(cases.POWER)]
    results.append(succeeds("journals", scene.assert_journals))
    failed = results.count(False)
    print(f"test result: {'FAILED' if failed else 'ok'}. {results.count(True)} passed; {failed} failed; "
          f"finished in {time.monotonic() - began:.1f} s")
    sys.exit(1 if failed else 0)


main()
