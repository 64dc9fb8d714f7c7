"""A run whose second rank stops in the middle of training; run by launch.py from test_pipeline.py."""
import os
import sys
import time

import train_gpt as gpt

HANG_STEP, LIMIT_S = 6, 4.0


def main() -> int:
    gpt.HANG_LIMIT_S = LIMIT_S
    gpt.Run.stage.__defaults__ = (LIMIT_S,)
    train_rows, calls = gpt.train_rows, []

    def hang(*args, **kwargs):
        calls.append(None)
        if os.environ["RANK"] == "1" and len(calls) == HANG_STEP:
            time.sleep(600)
        return train_rows(*args, **kwargs)
    gpt.train_rows = hang
    gpt.shipped_code = lambda: gpt.ShippedCode("packed", 40_000, "0" * 64, 200_000)       # packing takes a second
    return gpt.main([])


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
