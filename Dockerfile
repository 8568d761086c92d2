# walstream as a service: `docker build --tag walstream .`, and see docs/install.md.

# ---- The wheels: those of requirements.lock, by their hashes, and walstream's own
FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build

# Before the sources, so that a change of these does not fetch everything again.
COPY requirements.lock ./
RUN pip wheel --require-hashes --requirement requirements.lock --wheel-dir wheels

COPY pyproject.toml README.md LICENSE _walstream_pytest.py ./
COPY walstream walstream
COPY sql sql
# Nothing comes from an index any more: what is not among the wheels is a mistake here.
RUN python -m venv backend \
    && backend/bin/pip install --quiet --no-index --find-links wheels hatchling \
    && backend/bin/pip wheel --no-build-isolation --no-deps --wheel-dir own . \
    && python -m venv --without-pip /opt/walstream \
    && pip --python /opt/walstream/bin/python install --no-index --find-links wheels \
        "walstream[service] @ file://$(echo "$PWD"/own/*.whl)"

# ---- The image
FROM python:3.13-slim
LABEL org.opencontainers.image.title="walstream" \
      org.opencontainers.image.description="Every committed change of a PostgreSQL database, delivered to your code" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# Its number is fixed: it owns files in volumes, and Kubernetes' runAsNonRoot wants to see one.
RUN groupadd --system --gid 8432 walstream \
    && useradd --system --uid 8432 --gid walstream --no-log-init \
        --home-dir /var/lib/walstream --shell /usr/sbin/nologin walstream \
    && install --directory --owner=walstream --group=walstream --mode=0750 /var/lib/walstream \
    && install --directory /etc/walstream

COPY --from=build /opt/walstream /opt/walstream
COPY docker/walstream/healthy /usr/local/bin/healthy
COPY docker/walstream/walstream.toml /etc/walstream/walstream.toml

# Handlers are found beside the configuration. What walstream keeps, and every relative path, is in
# the volume: nothing else is written, so that the root file system can be read-only.
ENV PATH=/opt/walstream/bin:$PATH \
    PYTHONPATH=/etc/walstream \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    STATE_DIRECTORY=/var/lib/walstream \
    WALSTREAM_HTTP_LISTEN=0.0.0.0:8432

USER 8432:8432
WORKDIR /var/lib/walstream
VOLUME /var/lib/walstream
EXPOSE 8432
STOPSIGNAL SIGTERM

# Alive, not ready: there are those that kill what is unhealthy (Swarm does), and a restart does not
# help while the database is away, or while another process has the slot.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["healthy", "live"]

ENTRYPOINT ["walstream"]
CMD ["run", "--config", "/etc/walstream/walstream.toml"]
