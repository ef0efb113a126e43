"""What pyproject.toml cannot say: a wheel holds the recipes of this folder, as openvision/recipe/shipped."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithRecipes(build_py):
    """Copies the recipes beside the modules; an editable installation reads them where they are."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "openvision" / "recipe" / "shipped"
            shutil.copytree(Path(__file__).parent / "recipes", target, dirs_exist_ok=True)


setup(cmdclass={"build_py": WithRecipes})
