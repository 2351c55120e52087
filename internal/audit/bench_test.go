package audit

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
)

// defaultLogMiB is the size of the log to review, unless AUDIT_LOG_MIB says otherwise.
const defaultLogMiB = 1024

// BenchmarkReview reviews a generated log, beside jq with the simplest selection of what the review looks at, and beside grep, which only
// reads. Memory is the most that the process had.
func BenchmarkReview(b *testing.B) {
	size := defaultLogMiB
	if text := os.Getenv("AUDIT_LOG_MIB"); text != "" {
		var err error
		if size, err = strconv.Atoi(text); err != nil || size < 1 {
			b.Fatalf("AUDIT_LOG_MIB=%s is not a number of MiB", text)
		}
	}
	log := generated(b, int64(size)<<20)
	guard, err := filepath.Abs("../../bin/eni-guard")
	if err != nil {
		b.Fatal(err)
	}
	for _, c := range []struct {
		name string
		args []string
	}{
		{"eni-guard", []string{guard, "audit", "-o", "csv", log}},
		{"jq", []string{"jq", "-c", `select(.objectRef.resource == "pods" and (.verb == "delete" or .verb == "deletecollection" or .objectRef.subresource == "eviction"))`, log}},
		{"grep", []string{"grep", "-F", `"verb":"delete`, log}},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(int64(size) << 20)
			var most int64
			var cpu time.Duration
			for b.Loop() {
				cmd := exec.CommandContext(b.Context(), c.args[0], c.args[1:]...)
				cmd.Env = append(os.Environ(), "LC_ALL=C")
				var messages bytes.Buffer
				cmd.Stdout, cmd.Stderr = io.Discard, &messages
				err := cmd.Start()
				if err == nil {
					ended := make(chan struct{})
					watched := make(chan int64)
					go func() { watched <- mostMemory(cmd.Process.Pid, ended) }()
					err = cmd.Wait()
					close(ended)
					most = max(most, <-watched)
				}
				if err != nil {
					b.Fatalf("%v (`make bench` builds and installs what is missing)\n%s", err, messages.String())
				}
				cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
			}
			b.ReportMetric(float64(most)/1024, "MiB-max")
			// Tells more than the time where others use the machine.
			b.ReportMetric(cpu.Seconds()/float64(b.N), "cpu-s/op")
		})
	}
}

// mostMemory is the most resident memory that a process has had, in KiB, as last seen before it ended. What wait(2) tells is no less than that
// of the process that started it.
func mostMemory(pid int, ended <-chan struct{}) (most int64) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ended:
			return most
		case <-tick.C:
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue
		}
		if _, rest, found := strings.Cut(string(status), "VmHWM:"); found {
			var now int64
			if _, err := fmt.Sscan(rest, &now); err == nil {
				most = max(most, now)
			}
		}
	}
}

// share is a kind of request in the log of a busy cluster, and how many of ten thousand are of the kind.
type share struct {
	of   int
	line string
}

// generated writes a log of about this size with the mix of a busy cluster: above all leases, reads and status; a few in a hundred are about
// pods that come and go, and a few in ten thousand were forced, as in the recorded log. Every event has an ID and a time of its own.
func generated(b *testing.B, size int64) string {
	b.Helper()
	file, err := os.Create(filepath.Join(b.TempDir(), "audit.log"))
	if err != nil {
		b.Fatal(err)
	}
	out := bufio.NewWriterSize(file, 1<<20)
	random := rand.New(rand.NewPCG(1, 2))
	mix := mixOf(b)
	at := time.Date(2026, 11, 25, 0, 0, 0, 0, time.UTC)
	for n, written := 0, int64(0); written < size; n++ {
		pick, line := random.IntN(10000), ""
		for _, s := range mix {
			if pick -= s.of; pick < 0 {
				line = s.line
				break
			}
		}
		at = at.Add(time.Duration(random.IntN(2000)) * time.Microsecond)
		id := fmt.Sprintf("%08x-0000-4000-8000-%012x", n, random.Int64N(1<<48))
		n, err := out.WriteString(strings.NewReplacer("AUDIT-ID", id, "POD-UID", id, "NAME", id[:8], "TIME", at.Format("2006-01-02T15:04:05.000000Z")).Replace(line))
		if err != nil {
			b.Fatal(err)
		}
		written += int64(n)
	}
	if err := out.Flush(); err != nil {
		b.Fatal(err)
	}
	if err := file.Close(); err != nil {
		b.Fatal(err)
	}
	return file.Name()
}

func mixOf(b *testing.B) []share {
	b.Helper()
	event := func(level, verb, uri, user, ref, rest string) string {
		return `{"kind":"Event","apiVersion":"audit.k8s.io/v1","level":"` + level + `","auditID":"AUDIT-ID","stage":"ResponseComplete","requestURI":"` + uri + `","verb":"` + verb +
			`","user":{"username":"` + user + `","groups":["system:nodes","system:authenticated"],"extra":{"authentication.kubernetes.io/credential-id":["JTI=AUDIT-ID"]}},"sourceIPs":["10.0.12.34"],` +
			`"userAgent":"kubelet/v1.36.3 (linux/amd64) kubernetes/0d9d1a2","objectRef":` + ref + `,"responseStatus":{"metadata":{},"code":200},` + rest +
			`"requestReceivedTimestamp":"TIME","stageTimestamp":"TIME","annotations":{"authorization.k8s.io/decision":"allow","authorization.k8s.io/reason":""}}` + "\n"
	}
	// The body of a status is some kilobytes.
	status := `"requestObject":{"metadata":{"uid":"POD-UID"},"status":{"conditions":[` + strings.TrimSuffix(strings.Repeat(`{"lastProbeTime":null,"lastTransitionTime":"TIME","status":"True","type":"ContainersReady"},`, 12), ",") + `]}},`
	node := "system:node:node-1"
	mix := []share{
		{3000, event("Metadata", "update", "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/node-NAME?timeout=10s", node, `{"resource":"leases","namespace":"kube-node-lease","name":"node-NAME","uid":"POD-UID","apiGroup":"coordination.k8s.io","apiVersion":"v1","resourceVersion":"123"}`, "")},
		{2500, event("Metadata", "get", "/api/v1/namespaces/shop/configmaps/web-NAME", node, `{"resource":"configmaps","namespace":"shop","name":"web-NAME","apiVersion":"v1"}`, "")},
		{1200, event("Metadata", "watch", "/api/v1/namespaces/shop/secrets?allowWatchBookmarks=true&fieldSelector=metadata.name%3Dweb-NAME", node, `{"resource":"secrets","namespace":"shop","name":"web-NAME","apiVersion":"v1"}`, "")},
		{1300, event("Request", "patch", "/api/v1/namespaces/shop/pods/web-NAME/status", node, `{"resource":"pods","namespace":"shop","name":"web-NAME","apiVersion":"v1","subresource":"status"}`, status)},
		{600, event("Request", "patch", "/api/v1/nodes/node-NAME/status?timeout=10s", node, `{"resource":"nodes","name":"node-NAME","apiVersion":"v1","subresource":"status"}`, status)},
		{800, event("Metadata", "create", "/api/v1/namespaces/shop/events", node, `{"resource":"events","namespace":"shop","name":"web-NAME.18","apiVersion":"v1"}`, "")},
		{400, event("Request", "create", "/apis/authentication.k8s.io/v1/tokenreviews", node, `{"resource":"tokenreviews","apiGroup":"authentication.k8s.io","apiVersion":"v1"}`, status)},
		{100, event("Request", "create", "/api/v1/namespaces/shop/pods", "system:serviceaccount:kube-system:replicaset-controller", `{"resource":"pods","namespace":"shop","apiVersion":"v1"}`, status)},
		{50, event("Request", "delete", "/api/v1/namespaces/shop/pods/web-NAME", node, `{"resource":"pods","namespace":"shop","name":"web-NAME","apiVersion":"v1"}`,
			`"requestObject":{"kind":"DeleteOptions","apiVersion":"meta.k8s.io/__internal","gracePeriodSeconds":0,"preconditions":{"uid":"POD-UID"}},`)},
		{40, event("RequestResponse", "delete", "/api/v1/namespaces/shop/pods/web-NAME", "system:serviceaccount:kube-system:replicaset-controller", `{"resource":"pods","namespace":"shop","name":"web-NAME","apiVersion":"v1"}`,
			`"requestObject":{"kind":"DeleteOptions"},"responseObject":{"kind":"Pod","apiVersion":"v1","metadata":{"name":"web-NAME","namespace":"shop","uid":"POD-UID","deletionTimestamp":"TIME","deletionGracePeriodSeconds":30},"spec":{"nodeName":"node-1"}},`)},
	}
	// What was forced is from the recorded log.
	for line := range strings.Lines(recordedLog(b)) {
		_, rest, found := strings.Cut(line, `"auditID":"`)
		if _, rest, ok := strings.Cut(rest, `"`); found && ok && strings.Contains(line, `force-delete.eni-guard.io/decision`) {
			mix = append(mix, share{1, line[:strings.Index(line, `"auditID":"`)] + `"auditID":"AUDIT-ID"` + rest})
		}
	}
	total := 0
	for _, s := range mix {
		total += s.of
	}
	// The rest are reads.
	return append(mix, share{10000 - total, mix[1].line})
}

// recordedLog is a log that an API server has written.
func recordedLog(t testing.TB) string {
	t.Helper()
	packed, err := os.Open(everyWay)
	if err != nil {
		t.Fatal(err)
	}
	defer packed.Close()
	unpacked, err := gzip.NewReader(packed)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(unpacked)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
