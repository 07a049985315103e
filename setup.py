"Packaging: everything is read from settings.ini, so that it is written once."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class WithNotebooks(build_py):
    "The notebooks come along, for `medssl lab`: in a wheel they lie in medssl_nb/notebooks."

    def run(self):
        super().run()
        if self.editable_mode:  # a clone has them in nbs
            return
        for p in Path("nbs").rglob("*.ipynb"):
            if ".ipynb_checkpoints" not in p.parts:
                to = Path(self.build_lib, cfg["lib_name"], "notebooks", p.relative_to("nbs"))
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(p, to)


ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read("settings.ini")
cfg = ini["DEFAULT"]
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["medssl_nb", "medssl_nb.*"]),
    include_package_data=True,
    install_requires=cfg["requirements"].split(),
    extras_require={
        "nb": cfg["nb_requirements"].split(),
        "dev": cfg["dev_requirements"].split() + cfg["nb_requirements"].split(),
        # To fine-tune from `medssl export --to nnunet`; tested with requirements-nnunet.lock.
        "nnunet": ["nnunetv2>=2.6,<3"],
        # The plain name brings 0.32, which downgrades ipywidgets to 7; 1.0a55 fetches its viewer from the network.
        "itk": ["itkwidgets==1.0a55", "ngff-zarr<0.14"],
    },
    entry_points={"console_scripts": cfg["console_scripts"].split("\n"), "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    cmdclass={"build_py": WithNotebooks},
    zip_safe=False,
)
