#!/usr/bin/env bash
# A real Slurm on this machine, for tests: controller, accounting and two nodes, all of it in one folder.
#   tests/slurm/up.sh DIR && source DIR/env.sh        sinfo, sbatch, ... then work in this shell
#   tests/slurm/down.sh DIR
# As root, with Debian's packages: apt-get install --no-install-recommends slurm-wlm munge slurmdbd mariadb-server
# DIR must be short (a socket's path ends at 108 characters), and is for tests alone: the password is a constant.
set -euo pipefail
mkdir -p "${1:?say where: up.sh DIR}"
dir=$(cd "$1" && pwd)
nodes=${NODES:-2}
mkdir -p "$dir"/{log,run,state,db,etc}
host=$(hostname -s)
export SLURM_CONF="$dir/etc/slurm.conf"

patiently() { # SECONDS COMMAND...: until the command succeeds
  for _ in $(seq "$(($1 * 5))"); do
    "${@:2}" >/dev/null 2>&1 && return
    sleep 0.2
  done
  echo "up.sh: gave up on: ${*:2} (see $dir/log)" >&2
  return 1
}

start_munge() {
  (umask 077 && head -c 1024 /dev/urandom >"$dir/etc/munge.key")
  munged --force --key-file="$dir/etc/munge.key" --socket="$dir/run/munge" --pid-file="$dir/run/1-munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/run/munge.seed" 2>>"$dir/log/munged.start"
}

start_database() {
  local sql=(mariadb --no-defaults --socket="$dir/run/db")
  mariadb-install-db --no-defaults --user=root --datadir="$dir/db" --auth-root-authentication-method=normal \
    --skip-test-db >"$dir/log/database.install" 2>&1
  nohup mariadbd --no-defaults --user=root --datadir="$dir/db" --socket="$dir/run/db" --port="$DATABASE_PORT" \
    --bind-address=127.0.0.1 --pid-file="$dir/run/2-mariadbd.pid" --innodb-buffer-pool-size=64M \
    >"$dir/log/mariadbd.log" 2>&1 </dev/null &
  patiently 60 "${sql[@]}" -e "select 1"
  "${sql[@]}" -e "create database accounting; create user slurm@'%' identified by 'slurm';
    create user slurm@localhost identified by 'slurm'; grant all on accounting.* to slurm@'%';
    grant all on accounting.* to slurm@localhost;"
}

DATABASE_PORT=13316 ACCOUNTING_PORT=16829 CONTROLLER_PORT=16827 # nodes: 17011, 17012, ...

write_settings() {
  cat >"$dir/etc/slurmdbd.conf" <<END
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$ACCOUNTING_PORT
SlurmUser=root
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/run/3-slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$DATABASE_PORT
StorageUser=slurm
StoragePass=slurm
StorageLoc=accounting
END
  chmod 600 "$dir/etc/slurmdbd.conf"
  cat >"$SLURM_CONF" <<END
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$CONTROLLER_PORT
SlurmctldPidFile=$dir/run/4-slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
StateSaveLocation=$dir/state
SlurmdPidFile=$dir/run/5-slurmd-%n.pid
SlurmdLogFile=$dir/log/slurmd-%n.log
SlurmdSpoolDir=$dir/run/spool-%n
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits until its old credential has expired: by default two minutes
AuthInfo=socket=$dir/run/munge,cred_expire=${CRED_EXPIRE:-10}
CredType=cred/munge
# no cgroups, no systemd: nodes are processes of one machine
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=5,bf_interval=5
JobAcctGatherType=jobacct_gather/none
# accounting: without it nobody learns that a job was cancelled
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$ACCOUNTING_PORT
AccountingStoragePass=$dir/run/munge
END
  for i in $(seq "$nodes"); do
    mkdir -p "$dir/run/spool-n$i"
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((17010 + i)) CPUs=${CPUS:-1} RealMemory=2000"
  done >>"$SLURM_CONF"
  echo "PartitionName=tests Nodes=n[1-$nodes] Default=YES MaxTime=60 State=UP" >>"$SLURM_CONF"
  printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" >"$dir/env.sh"
}

registered() { sacctmgr -in add cluster tests || sacctmgr -n show cluster | grep -qw tests; }
all_idle() { [ "$(sinfo -h -t idle -o %D)" = "$nodes" ]; }

start_munge
start_database
write_settings
slurmdbd
patiently 60 registered
slurmctld -c
for i in $(seq "$nodes"); do slurmd -N "n$i"; done
patiently 60 all_idle
sinfo
