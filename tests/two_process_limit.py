"""train_gpt.py with less patience for a rank that makes no progress; test_rehearsal.py launches it."""
import os
import sys

import train_gpt as gpt

if __name__ == "__main__":
    gpt.HANG_LIMIT_S = 5.0
    gpt.Run.stage.__defaults__ = (gpt.HANG_LIMIT_S,)
    code = gpt.main([])
    sys.stdout.flush()
    os._exit(code)
