# Asked of the job's interpreter, without importing torch: what a bridge must be built against. Prints one JSON line.
import json
import sys

if sys.path and sys.path[0] == "":
    del sys.path[0]  # a torch.py in the current folder is not the job's torch
answer = {"python": list(sys.version_info[:3]), "executable": sys.executable}
if sys.version_info >= (3, 10):
    import importlib.util
    import os
    import re
    import sysconfig

    answer["implementation"] = sys.implementation.name
    answer["free_threaded"] = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    include = sysconfig.get_paths()["include"]
    answer["include"] = include
    answer["python_h"] = os.path.isfile(os.path.join(include, "Python.h"))
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        root = os.path.dirname(os.path.abspath(spec.origin))
        values = {}
        try:
            with open(os.path.join(root, "version.py")) as file:
                exec(file.read(), values)
        except OSError:
            pass
        abi = "1"
        try:
            with open(os.path.join(root, "share", "cmake", "Torch", "TorchConfig.cmake")) as file:
                found = re.search(r"_GLIBCXX_USE_CXX11_ABI=([01])", file.read())
            abi = found.group(1) if found else abi
        except OSError:
            pass
        answer["torch"] = {
            "root": root,
            "version": str(values.get("__version__", "")),
            "cuda": values.get("cuda"),
            "cxx11_abi": int(abi),
            "headers": os.path.isfile(os.path.join(root, "include", "torch", "extension.h")),
        }
print(json.dumps(answer))
