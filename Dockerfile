# For other Python versions, macOS and Windows: the same commands in a container.
#   docker build -t federated .
#   docker run --rm -v "$PWD/runs:/federated/runs" federated make run
#   docker run --rm federated make test
#   docker run --rm -p 8888:8888 federated make notebook ARGS="--ip 0.0.0.0 --allow-root"
FROM --platform=linux/amd64 python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /federated
COPY Makefile requirements.txt ./
COPY tests/requirements.txt tests/
RUN make .venv/dev
COPY federated_learning.py federated_mnist.ipynb pyproject.toml LICENSE Dockerfile ./
COPY README.md CONTRIBUTING.md CHANGELOG.md CITATION.cff ./
COPY docs docs
COPY data data
COPY images images
COPY tests tests
COPY benchmarks benchmarks
COPY harness harness
COPY variants variants
CMD ["make", "run"]
