"""Compose the demo's data set, "digits in photos". This script runs tools/demo/data.py and has the same options.

python tools/make_demo_data.py                             # outputs/demo/data, seconds on one core
python tools/make_demo_data.py --train 5000 --val 500 --size 256 --output outputs/big
"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parent / "demo/data.py"), run_name="__main__")
