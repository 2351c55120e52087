package agent

import (
	"fmt"
	"testing"
)

// Finding one pod's processes among the cgroups of more and more pods.
func BenchmarkProcesses(b *testing.B) {
	for _, pods := range []int{10, 110} {
		h := newRecordedHost(b)
		for i := range pods {
			h.group(fmt.Sprintf("memory/kubepods/burstable/pod00000000-0000-0000-0000-%012d/c1", i), pid)
		}
		h.group("memory/kubepods/burstable/pod"+podUID+"/c1", pid)
		h.thread(pid, "java", "D", "nfs_wait", "net:[7]")
		b.Run(fmt.Sprintf("pods=%d", pods), func(b *testing.B) {
			for b.Loop() {
				if found, err := h.processes(b.Context()); err != nil || len(found) != 1 {
					b.Fatal(found, err)
				}
			}
		})
	}
}

// Looking at all of this machine, as for leftovers, without a runtime.
func BenchmarkSurvey(b *testing.B) {
	i := newInspector("node-a", realNode, fakeRuntime(knowsNothing))
	for b.Loop() {
		_ = i.survey(b.Context())
	}
}
