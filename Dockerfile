# mmkd in an image of its own, as `make install` installs it:
#   docker build -t mmkd . && docker run --rm mmkd doctor mmkd::lad_r50.py
# Without a Docker daemon, tools/clean_root.sh runs the same steps.
FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends \
    ca-certificates g++ make python3 python3-dev python3-venv && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /mmkd
COPY . .
RUN make install
ENV PATH=/mmkd/.venv/bin:$PATH OMP_NUM_THREADS=1
ENTRYPOINT ["mmkd"]
CMD ["--help"]
