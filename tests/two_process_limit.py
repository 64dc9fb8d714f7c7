"""train_gpt.py with less patience for a rank that makes no progress; test_rehearsal.py launches it."""
import os
import sys

import train_gpt as gpt

LIMITS_S = {"training": 5.0, "calibration": 5.0, "scoring": 5.0}          # where a rank is hit


def main() -> int:
    stage = gpt.Run.stage

    def with_less_patience(run, name, limit_s=gpt.HANG_LIMIT_S):
        stage(run, name, LIMITS_S.get(name, limit_s))
    gpt.Run.stage = with_less_patience
    gpt.shipped_code = lambda: gpt.ShippedCode("packed", 40_000, "0" * 64, 200_000)       # packing takes a second
    return gpt.main([])


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
