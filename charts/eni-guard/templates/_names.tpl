{{- define "eni-guard.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "eni-guard.selector" -}}
app.kubernetes.io/name: eni-guard
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "eni-guard.labels" -}}
{{ include "eni-guard.selector" . }}
app.kubernetes.io/part-of: eni-guard
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "eni-guard.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- /*
Never the guard's own namespace, so that it can always be mended. A namespace that is off is not even asked about; if
the default is off, only those are that say otherwise.
*/ -}}
{{- define "eni-guard.guardedNamespaces" -}}
matchExpressions:
- {key: kubernetes.io/metadata.name, operator: NotIn, values: [{{ .Release.Namespace }}]}
{{- if eq .Values.mode "off" }}
- {key: eni-guard.io/mode, operator: In, values: [deny, hold, audit]}
{{- else }}
- {key: eni-guard.io/mode, operator: NotIn, values: ["off"]}
{{- end }}
{{- end -}}
