"""train_gpt.py with less patience for a rank that makes no progress; run by launch.py from test_rehearsal.py."""
import os
import sys

import train_gpt as gpt

if __name__ == "__main__":
    gpt.HANG_LIMIT_S = 5.0
    gpt.Run.stage.__defaults__ = (gpt.HANG_LIMIT_S,)
    code = gpt.main([])
    sys.stdout.flush()
    os._exit(code)
