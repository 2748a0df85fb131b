"""``python -m hf_clm``, for launchers: ``accelerate launch -m hf_clm train RECIPE``."""

from hf_clm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
