"""The files under test lie one folder up; they are imported as a reader runs them, without installation."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
