#!/usr/bin/env bash
# A real Slurm on this machine alone, with two nodes of two CPUs: tests/slurm/cluster.sh start|stop FOLDER
# Needs root and Debian's packages slurm-wlm and munge. FOLDER holds its state; no service of the system is touched.
set -euo pipefail
command=$1
folder=$(realpath -m "$2")
export SLURM_CONF=$folder/slurm.conf

stop() {
    for name in slurmctld slurmd-n1 slurmd-n2 munged; do
        if [ -s "$folder/$name.pid" ]; then kill "$(cat "$folder/$name.pid")" 2>/dev/null || true; fi
    done
}

start() {
    mkdir -p "$folder/state" "$folder/spool"
    chmod 755 "$folder"
    mkdir -p "$folder/munge" /run/munge
    [ -s "$folder/munge/key" ] || dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
    chmod 400 "$folder/munge/key"
    chown -R munge: "$folder/munge" /run/munge
    chmod 700 "$folder/munge"
    chmod 755 /run/munge
    # --force: the folder may lie below one that others may write to, as /tmp is
    runuser -u munge -- /usr/sbin/munged --force --key-file="$folder/munge/key" --seed-file="$folder/munge/seed" \
        --log-file="$folder/munge/log" --pid-file="$folder/munge/pid"
    cp "$folder/munge/pid" "$folder/munged.pid"
    cat > "$SLURM_CONF" <<END
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=17100
SlurmUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=17101 CPUs=4
NodeName=n2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=17102 CPUs=4
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2
END
    mkdir -p "$folder/spool/n1" "$folder/spool/n2"
    /usr/sbin/slurmctld
    /usr/sbin/slurmd -N n1
    /usr/sbin/slurmd -N n2
    for _ in $(seq 100); do
        if [ "$(sinfo -h -o '%t %D')" = "idle 2" ]; then exit 0; fi
        sleep 0.2
    done
    sinfo >&2
    exit 1
}

"$command"
