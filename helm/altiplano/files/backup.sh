#!/usr/bin/env bash
# Dump a PostgreSQL database that the PG* variables name into BACKUP_DIRECTORY, check the dump, and keep the newest BACKUP_KEEP.
# A dump has its final name only when it was read back, so a file that is there is a file that can be restored:
#   pg_restore --clean --if-exists --dbname=mlflow mlflow-20261121T071500Z.dump
set -euo pipefail
umask 077
name="${PGDATABASE}-$(date -u +%Y%m%dT%H%M%SZ).dump"
partial="${BACKUP_DIRECTORY}/.${name}.partial"
trap 'rm -f "${partial}"' EXIT
pg_dump --format=custom --file="${partial}"
pg_restore --list "${partial}" >/dev/null
mv "${partial}" "${BACKUP_DIRECTORY}/${name}"
(cd "${BACKUP_DIRECTORY}" && sha256sum "${name}" >"${name}.sha256")
find "${BACKUP_DIRECTORY}" -maxdepth 1 -name "${PGDATABASE}-*.dump" | sort -r | tail -n "+$((BACKUP_KEEP + 1))" | while read -r old; do
  rm -f "${old}" "${old}.sha256"
done
echo "wrote ${name} ($(stat -c %s "${BACKUP_DIRECTORY}/${name}") bytes)"
