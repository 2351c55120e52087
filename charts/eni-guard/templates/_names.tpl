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
