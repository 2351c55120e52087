package observer

import (
	"net/netip"
	"os"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	webUID   = types.UID("11111111-1111-1111-1111-111111111111")
	otherUID = types.UID("22222222-2222-2222-2222-222222222222")
	webIP    = "10.111.1.2"
)

var (
	start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

	inCgroup = Process{ID: ProcessID{PID: 10, Start: 100}, Started: start, Pod: webUID, Netns: "net:[1]"}
	outside  = Process{ID: ProcessID{PID: 11, Start: 110}, Netns: "net:[1]"}
	mount    = Namespace{ID: "net:[1]", Path: "/run/netns/cni-a", Addresses: []netip.Addr{netip.MustParseAddr(webIP)}}
)

func at(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }

func pod(uid types.UID, name, ip string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: uid},
		Status:     corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: ip}}},
	}
}

func sight(seconds int, parts ...any) Sight {
	s := Sight{Began: at(seconds), Ended: at(seconds)}
	for _, part := range parts {
		switch part := part.(type) {
		case Process:
			s.Processes = append(s.Processes, part)
		case Namespace:
			s.Namespaces = append(s.Namespaces, part)
		}
	}
	return s
}

// In each case the object is there from the beginning, and gone after ten seconds.
func TestWhatIsLeftWhenAnObjectGoes(t *testing.T) {
	guarded := Record{Guarded: true}
	unrelated := Process{ID: ProcessID{PID: 12, Start: 120}, Pod: otherUID, Netns: "net:[1]"}
	// The kernel has given the number of the namespace, and the PID, to somebody else.
	reused := Namespace{ID: "net:[1]", Path: "/run/netns/cni-b", Addresses: []netip.Addr{netip.MustParseAddr(webIP)}}
	reusedPID := Process{ID: ProcessID{PID: 11, Start: 200}, Netns: "net:[1]"}
	young := inCgroup
	young.Started = at(8)
	late := inCgroup
	late.Started = at(11)
	left := Process{ID: outside.ID, Netns: "net:[7]"}
	for name, c := range map[string]struct {
		sights []Sight
		record Record
		want   Verdict
	}{
		"nothing":                                {[]Sight{sight(1, inCgroup, mount), sight(11)}, guarded, Clean},
		"ended between two looks":                {[]Sight{sight(1, inCgroup, mount), sight(9, inCgroup, mount), sight(11)}, guarded, Clean},
		"a process in its cgroup":                {[]Sight{sight(1, inCgroup, mount), sight(11, inCgroup)}, guarded, Violation},
		"only its address":                       {[]Sight{sight(1, inCgroup, mount), sight(11, mount)}, guarded, Violation},
		"a namespace without its address":        {[]Sight{sight(1, inCgroup, mount), sight(11, Namespace{ID: mount.ID, Path: mount.Path})}, guarded, Clean},
		"a process outside its cgroup":           {[]Sight{sight(1, inCgroup, outside, mount), sight(11, outside)}, guarded, Violation},
		"one that has left its cgroup":           {[]Sight{sight(1, inCgroup, mount), sight(11, Process{ID: inCgroup.ID, Netns: "net:[1]"})}, guarded, Violation},
		"one that had only looked in":            {[]Sight{sight(1, inCgroup, outside, mount), sight(11, left)}, guarded, Clean},
		"a process of another pod":               {[]Sight{sight(1, inCgroup, mount, unrelated), sight(11, unrelated)}, guarded, Clean},
		"the number and address of another's":    {[]Sight{sight(1, inCgroup, mount), sight(11, reused, unrelated, reusedPID)}, guarded, Clean},
		"found only by a second look":            {[]Sight{sight(1, inCgroup, mount), sight(11), sight(12, mount)}, guarded, Violation},
		"started after its object was gone":      {[]Sight{sight(1), sight(12, late, mount)}, guarded, CameUp},
		"started before, seen only after":        {[]Sight{sight(1), sight(12, young, mount)}, guarded, Violation},
		"started while it was let go":            {[]Sight{sight(1), sight(12, young, mount)}, Record{Guarded: true, Received: at(7), Completed: at(9)}, CameUp},
		"started before it was let go":           {[]Sight{sight(1), sight(12, young, mount)}, Record{Guarded: true, Received: at(9), Completed: at(9)}, Violation},
		"no look since":                          {[]Sight{sight(1, inCgroup, mount)}, guarded, NotLookedAt},
		"mode off":                               {[]Sight{sight(1, inCgroup, mount), sight(11, mount)}, Record{}, Control},
		"an override":                            {[]Sight{sight(1, inCgroup, mount), sight(11, mount)}, Record{Guarded: true, Override: true}, Overridden},
		"the kubelet":                            {[]Sight{sight(1, inCgroup, mount), sight(11, mount)}, Record{Guarded: true, ByKubelet: true}, ByKubelet},
		"an eviction that failed open":           {[]Sight{sight(1, inCgroup, mount), sight(11, mount)}, Record{Guarded: true, FailedOpen: true}, FailedOpen},
		"a finished pod":                         {[]Sight{sight(1, inCgroup, mount), sight(11, mount)}, Record{Guarded: true, Reason: "ContainersTerminated"}, ByContainers},
		"what the guard called released":         {[]Sight{sight(1, inCgroup, mount), sight(11, mount)}, Record{Guarded: true, Reason: "SandboxReleased"}, Violation},
		"bound between answer and late watch":    {[]Sight{sight(1, inCgroup, mount), sight(7, mount), sight(11)}, Record{Guarded: true, Received: at(6), Completed: at(6)}, Violation},
		"released between answer and late watch": {[]Sight{sight(1, inCgroup, mount), sight(5, mount), sight(11)}, Record{Guarded: true, Received: at(6), Completed: at(6)}, Clean},
	} {
		t.Run(name, func(t *testing.T) {
			l := NewLedger()
			l.Seen(pod(webUID, "web-0", webIP))
			l.Seen(pod(otherUID, "web-1", "10.111.1.3"))
			gone := false
			for _, s := range c.sights {
				if s.Began.After(at(10)) && !gone {
					gone = true
					l.Gone(webUID, at(10), false)
				}
				l.Looked(s, nil, nil)
			}
			l.Gone(webUID, at(10), false)
			removals := l.Removals()
			if len(removals) != 1 {
				t.Fatalf("%d removals", len(removals))
			}
			if got := Judge(removals[0], c.record); got != c.want {
				t.Errorf("got %q, want %q: %+v", got, c.want, removals[0])
			}
		})
	}
}

// An API server that is killed takes the record of its last moment with it. What it has removed then may have been an override.
func TestARecordThatIsLost(t *testing.T) {
	for name, c := range map[string]struct {
		annotations map[string]string
		lost        bool
		want        Verdict
	}{
		"an override":            {map[string]string{overrideAnnotation: "a test"}, true, RecordLost},
		"one that ends later":    {map[string]string{overrideAnnotation: "a test", untilAnnotation: at(11).Format(time.RFC3339)}, true, RecordLost},
		"one that has ended":     {map[string]string{overrideAnnotation: "a test", untilAnnotation: at(9).Format(time.RFC3339)}, true, Violation},
		"no override":            {nil, true, Violation},
		"an override, no outage": {map[string]string{overrideAnnotation: "a test"}, false, Violation},
	} {
		r := Removal{Pod: pod(webUID, "web-0", webIP), SeenAt: at(10), StartedAt: at(0), LastBound: at(11), Judged: true}
		r.Pod.Annotations = c.annotations
		got := Judge(r, Record{Guarded: true, Lost: c.lost})
		if got != c.want || got.Explained() != (c.want == RecordLost) {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
}

func TestAddressesOfTwoPods(t *testing.T) {
	other := Process{ID: ProcessID{PID: 20, Start: 200}, Pod: otherUID, Netns: "net:[2]"}
	second := Namespace{ID: "net:[2]", Path: "/run/netns/cni-b", Addresses: []netip.Addr{netip.MustParseAddr(webIP)}}
	records := func(owner string) map[netip.Addr]string {
		all := map[netip.Addr]string{netip.MustParseAddr("10.111.1.9"): "shop/web-9"}
		if owner != "" {
			all[netip.MustParseAddr(webIP)] = owner
		}
		return all
	}
	type step struct {
		sight         Sight
		before, after map[netip.Addr]string
	}
	own := records("shop/web-0")
	for name, c := range map[string]struct {
		steps []step
		want  []string
	}{
		"its own":                     {[]step{{sight(1, inCgroup, mount), own, own}, {sight(9, mount), own, own}, {sight(10, mount), own, own}}, nil},
		"not yet recorded":            {[]step{{sight(1, inCgroup, mount), records(""), records("")}, {sight(2, mount), records(""), own}}, nil},
		"released while in use":       {[]step{{sight(1, inCgroup, mount), own, own}, {sight(9, mount), records(""), records("")}, {sight(10, mount), records(""), records("")}}, []string{""}},
		"released at once":            {[]step{{sight(1, inCgroup, mount), own, own}, {sight(1, mount), own, records("")}, {sight(2, mount), records(""), records("")}, {sight(2, mount), records(""), records("")}}, []string{""}},
		"given to another":            {[]step{{sight(1, inCgroup, mount), own, own}, {sight(9, mount), own, records("shop/x")}, {sight(10, mount), records("shop/x"), records("shop/x")}, {sight(11, mount), records("shop/x"), records("shop/x")}}, []string{"shop/x"}},
		"moved while one look lasted": {[]step{{sight(1, inCgroup, mount), own, own}, {sight(2, mount, other, second), own, own}, {sight(3, other, second), nil, nil}}, nil},
		"in two namespaces":           {[]step{{sight(1, inCgroup, mount), own, own}, {sight(2, mount, other, second), own, own}, {sight(3, mount, other, second), own, own}}, []string{"shop/web-1", "shop/web-0"}},
	} {
		t.Run(name, func(t *testing.T) {
			l := NewLedger()
			l.Seen(pod(webUID, "web-0", webIP))
			l.Seen(pod(otherUID, "web-1", webIP))
			for _, s := range c.steps {
				l.Looked(s.sight, s.before, s.after)
			}
			var got []string
			for _, s := range l.SharedAddresses() {
				got = append(got, s.Other)
			}
			if len(got) != len(c.want) {
				t.Fatalf("got %q, want %q", got, c.want)
			}
			for i := range got {
				if got[i] != c.want[i] {
					t.Errorf("got %q, want %q", got, c.want)
				}
			}
		})
	}
}

func TestLookSeesThisProcess(t *testing.T) {
	s, err := Look()
	if err != nil {
		t.Fatal(err)
	}
	netns, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range s.Processes {
		if p.ID.PID == os.Getpid() {
			if p.Netns != netns || p.ID.Start == 0 || p.Started.After(time.Now().Add(tick)) || p.Started.Before(time.Now().Add(-time.Hour)) {
				t.Errorf("got %+v", p)
			}
			return
		}
	}
	t.Errorf("process %d is not among %d", os.Getpid(), len(s.Processes))
}
