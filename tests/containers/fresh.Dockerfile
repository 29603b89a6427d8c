# A bare Debian with what the README says is needed, the clone, and a user who is not root; see fresh.py.
FROM rust:1-bookworm AS rust
FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ make python3-pip ca-certificates && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home newcomer
# Rust as rustup installs it: for its user.
COPY --from=rust --chown=newcomer /usr/local/rustup /usr/local/rustup
COPY --from=rust --chown=newcomer /usr/local/cargo /usr/local/cargo
ENV RUSTUP_HOME=/usr/local/rustup PATH=/usr/local/cargo/bin:$PATH
COPY --chown=newcomer . /home/newcomer/lathe
USER newcomer
WORKDIR /home/newcomer/lathe
CMD ["sleep", "infinity"]
